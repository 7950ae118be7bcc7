# SPDX-License-Identifier: Apache-2.0
"""What is told from vLLM's sources is what vLLM itself answers when it is imported."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_dflash.compat import model_support
from vllm_dflash.compat.model_support import KV_CACHE_DTYPES, engine_facts

pytest.importorskip("vllm")

#: Plain, inherited, multimodal; with and without the interface.
ARCHITECTURES = (
    "GPT2LMHeadModel",
    "Gemma3ForCausalLM",
    "GptOssForCausalLM",
    "KimiVLForConditionalGeneration",
    "LlamaForCausalLM",
    "MambaForCausalLM",
    "MistralForCausalLM",
    "OlmoForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
)

ASK_VLLM = f"""
import json, sys
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.model_executor.models.registry import ModelRegistry
found = {{}}
for name in {ARCHITECTURES!r}:
    found[name] = bool(supports_eagle3(ModelRegistry.models[name].load_model_cls()))
print("\\n" + json.dumps(found))
"""


def test_the_interface_is_told_as_vllm_tells_it() -> None:
    child = subprocess.run([sys.executable, "-c", ASK_VLLM], capture_output=True, text=True, timeout=300, check=True)
    answers = json.loads(child.stdout.splitlines()[-1])
    assert set(answers.values()) == {True, False}, "the list needs both kinds"
    told = {name: engine_facts([name]) for name in ARCHITECTURES}
    assert {name: facts.taps_target for name, facts in told.items()} == answers
    assert all(facts.knows_target for facts in told.values())


def test_an_architecture_that_vllm_does_not_list() -> None:
    facts = engine_facts(["NobodyForCausalLM"])
    assert (facts.knows_target, facts.taps_target) == (False, None)


def test_no_architecture_is_unknown() -> None:
    assert engine_facts([]).knows_target is None


def test_without_vllm_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_support, "installed_version", lambda: None)
    facts = engine_facts(["Qwen3ForCausalLM"])
    assert (facts.version, facts.knows_target, facts.taps_target) == (None, None, None)


def test_an_unfamiliar_registry_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "registry.py"
    file.write_text("_MODELS = load_them()\n", encoding="utf-8")
    monkeypatch.setattr(model_support, "_source", lambda module: file)
    model_support._registry.cache_clear()
    assert model_support._target_support(["Qwen3ForCausalLM"]) == (None, None)
    model_support._registry.cache_clear()


def test_the_switch_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DFLASH", "0")
    assert engine_facts([]).is_switched_off


@pytest.mark.parametrize(
    ("backend", "module", "name"),
    [
        ("CPU_ATTN", "cpu_attn", "CPUAttentionBackend"),
        ("FLASH_ATTN", "flash_attn", "FlashAttentionBackend"),
        ("FLEX_ATTENTION", "flex_attention", "FlexAttentionBackend"),
        ("TRITON_ATTN", "triton_attn", "TritonAttentionBackend"),
    ],
)
def test_backends_are_those_of_vllm(backend: str, module: str, name: str) -> None:
    theirs = getattr(importlib.import_module(f"vllm.v1.attention.backends.{module}"), name)
    assert theirs.get_name() == backend
    assert theirs.supports_non_causal()
    assert KV_CACHE_DTYPES[backend] == set(theirs.supported_kv_cache_dtypes)
