# SPDX-License-Identifier: Apache-2.0
"""The command on copies of the shipped pair with one fault planted in each: is it found, and nothing else?"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.helpers import truncate
from vllm_dflash.cli import app
from vllm_dflash.console import SHIPPED_PAIR

WEIGHTS = "drafter/model.safetensors"


def doctor(pair: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the report of a pair."""
    models = ("--target", str(pair / "target"), "--draft", str(pair / "drafter"))
    result = CliRunner().invoke(app, ["doctor", *models, "--json", *arguments])
    return result.exit_code, json.loads(result.stdout)


def alarms(report: dict[str, Any]) -> set[tuple[str, str]]:
    """Severity and id of all warnings and errors."""
    found = {(one["severity"], one["id"]) for one in report["findings"]}
    return {(severity, id) for severity, id in found if severity in ("warning", "error")}


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    shutil.copytree(SHIPPED_PAIR, tmp_path / "pair")
    return tmp_path / "pair"


def edit(file: Path, **changes: Any) -> None:
    """Set top-level keys of a JSON file; those of dflash_config one by one."""
    content = json.loads(file.read_text(encoding="utf-8"))
    nested = content.get("dflash_config", {}) | changes.pop("dflash_config", {})
    content |= changes | ({"dflash_config": nested} if nested else {})
    file.write_text(json.dumps(content), encoding="utf-8")


def drafter(**changes: Any) -> Callable[[Path], None]:
    return lambda pair: edit(pair / "drafter/config.json", **changes)


def target(**changes: Any) -> Callable[[Path], None]:
    return lambda pair: edit(pair / "target/config.json", **changes)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def plant(pair: Path) -> None:
        content = load_file(pair / WEIGHTS)
        change(content)
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, pair / WEIGHTS)

    return plant


def nan_norm(content: dict[str, torch.Tensor]) -> None:
    content["hidden_norm.weight"][7] = float("nan")


def sharded(pair: Path) -> None:
    """An index that names a file which was not downloaded."""
    index = {"weight_map": {"norm.weight": "model-00002-of-00002.safetensors", "fc.weight": "model.safetensors"}}
    (pair / "drafter/model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def both(*plants: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda pair: [plant(pair) for plant in plants] and None


def reduced_without_head(pair: Path) -> None:
    """A drafter of half the vocabulary whose own LM head was lost, as when the target's is put in its place."""
    drafter(draft_vocab_size=1024)(pair)
    tensors(lambda content: content.update({"d2t": torch.zeros(1024, dtype=torch.long)}))(pair)


ZERO_HEAD = {"lm_head.weight": torch.zeros(2048, 192, dtype=torch.bfloat16)}

FAULTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str, str]] = {
    # name: (what is planted, options, severity, id)
    "layer ids beyond the target": (
        drafter(dflash_config={"target_layer_ids": [1, 3, 5, 8]}), (), "error", "target-layers",
    ),
    "layer ids that are no ids": (
        drafter(dflash_config={"target_layer_ids": [5, 3, 1, 6]}), (), "error", "target-layers",
    ),
    "layer ids one above the formula": (
        drafter(dflash_config={"target_layer_ids": [2, 3, 5, 6]}), (), "warning", "target-layers",
    ),
    "another target's depth": (drafter(num_target_layers=12), (), "error", "target-depth"),
    "hidden size": (target(hidden_size=256), (), "error", "hidden-size"),
    "vocabulary": (target(vocab_size=2304), (), "error", "vocabulary"),
    "mask id out of range": (drafter(dflash_config={"mask_token_id": 2048}), (), "error", "mask-token"),
    "mask id missing": (drafter(dflash_config={"mask_token_id": None}), (), "error", "mask-token"),
    "mask id of text": (drafter(dflash_config={"mask_token_id": 500}), (), "warning", "mask-token-text"),
    "mask id of the end token": (drafter(dflash_config={"mask_token_id": 2}), (), "warning", "mask-token-text"),
    "mask id of the template": (drafter(dflash_config={"mask_token_id": 1}), (), "warning", "mask-token-text"),
    "RoPE theta": (
        drafter(rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}), (), "warning", "rope-theta",
    ),
    "RoPE partial factor": (
        drafter(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
        (), "warning", "rope-partial",
    ),
    "RoPE scaling": (
        target(rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}), (), "warning",
        "rope-scaling",
    ),
    "K as large as the block": (lambda pair: None, ("-k", "16"), "error", "block-size"),
    "truncated weights": (lambda pair: truncate(pair / WEIGHTS), (), "error", "tensors-file"),
    "a shard that is not there": (sharded, (), "error", "tensors-file"),
    "no weights": (lambda pair: (pair / WEIGHTS).unlink(), (), "error", "tensors-file"),
    "truncated weights of the target": (
        lambda pair: truncate(pair / "target/model.safetensors"), (), "error", "target-weights",
    ),
    "missing tensor": (
        tensors(lambda content: content.pop("layers.1.mlp.up_proj.weight")), (), "error", "tensors-missing",
    ),
    "misshapen tensor": (
        tensors(lambda content: content.update({"fc.weight": content["fc.weight"][:, :576]})), (), "error",
        "tensors-shape",
    ),
    "tensor of another architecture": (
        tensors(lambda content: content.update({"markov.weight": torch.ones(4)})), (), "error", "tensors-extra",
    ),
    "fusion of zeros": (tensors(lambda content: content["fc.weight"].zero_()), (), "error", "tensors-values"),
    "a norm that is not a number": (tensors(nan_norm), (), "error", "tensors-values"),
    "own LM head dropped": (reduced_without_head, (), "error", "tensors-missing"),
    "own LM head of zeros": (tensors(lambda content: content.update(ZERO_HEAD)), (), "error", "tensors-values"),
    "sliding layers without the flag": (
        drafter(layer_types=["sliding_attention"] * 3, sliding_window=256, use_sliding_window=False), (), "error",
        "sliding-window",
    ),
    "the flag without sliding layers": (
        drafter(sliding_window=256, use_sliding_window=True), (), "warning", "sliding-window",
    ),
    "a DFlash2 checkpoint": (drafter(architectures=["DFlash2DraftModel"]), (), "warning", "drafter-kind"),
    "no drafter at all": (drafter(architectures=["Qwen3ForCausalLM"]), (), "error", "drafter-kind"),
    "a part that is not there": (drafter(conv_kernel_size=2), (), "error", "drafter-kind"),
    "a shorter context": (drafter(max_position_embeddings=512), (), "warning", "context-length"),
    "more than the target's context": (lambda pair: None, ("--max-model-len", "4096"), "error", "context-length"),
    "a target without hidden states": (target(architectures=["GPT2LMHeadModel"]), (), "error", "target-architecture"),
    "a target that vLLM does not know": (target(architectures=["Nobody"]), (), "warning", "target-architecture"),
    "an unknown KV cache": (lambda pair: None, ("--kv-cache-dtype", "int3"), "error", "kv-cache-dtype"),
    "heads that do not divide": (lambda pair: None, ("--tensor-parallel-size", "3"), "error", "tensor-parallel"),
}  # fmt: skip


def test_the_good_pair_raises_no_alarm(pair: Path) -> None:
    code, report = doctor(pair)
    assert (code, report["exit_code"], alarms(report)) == (0, 0, set())
    assert {one["id"] for one in report["findings"]} == {
        "vllm-version", "target-architecture", "drafter-kind", "tensors", "target-weights", "target-depth",
        "hidden-size", "vocabulary", "target-layers", "mask-token", "embedding", "lm-head", "rope", "sliding-window",
        "block-size", "context-length", "dtype", "quantization", "kv-cache-dtype", "memory", "prefix-cache",
        "chat-template", "thinking",
    }  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(pair: Path, name: str) -> None:
    plant, arguments, severity, id = FAULTS[name]
    plant(pair)
    code, report = doctor(pair, *arguments)
    assert alarms(report) == {(severity, id)}
    assert code == report["exit_code"] == {"warning": 1, "error": 2}[severity]
    assert all(one["change"] for one in report["findings"] if one["severity"] in ("warning", "error"))


def test_a_thinking_template_is_told(pair: Path) -> None:
    template = "{% if enable_thinking %}<think>{% endif %}{{ messages[0]['content'] }}"
    edit(pair / "target/tokenizer_config.json", chat_template=template)
    code, report = doctor(pair)
    (told,) = (one for one in report["findings"] if one["id"] == "thinking")
    assert (code, told["severity"]) == (0, "info")
    assert "enable_thinking" in told["change"]


def test_one_bad_key_does_not_hide_the_others(pair: Path) -> None:
    drafter(
        block_size=1,
        dflash_config={"mask_token_id": 9999, "target_layer_ids": "all"},
        num_target_layers=12,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )(pair)
    tensors(lambda content: content["norm.weight"].zero_())(pair)
    code, report = doctor(pair)
    assert code == 2
    assert alarms(report) == {
        ("error", "block-size"),
        ("error", "mask-token"),
        ("error", "target-layers"),
        ("error", "target-depth"),
        ("error", "tensors-values"),
        ("warning", "rope-theta"),
    }


@pytest.mark.parametrize(("ids", "shift"), [([2, 4, 6, 7], "-1"), ([0, 2, 4, 5], "+1")])
def test_layer_ids_off_by_one_are_found_by_running(pair: Path, one_thread: None, ids: list[int], shift: str) -> None:
    drafter(dflash_config={"target_layer_ids": ids})(pair)
    # The prompts' own token ids are for the shipped target alone.
    shutil.rmtree(pair / "target")
    arguments = ("--target", str(SHIPPED_PAIR / "target"), "--draft", str(pair / "drafter"), "--run", "16", "--json")
    result = CliRunner().invoke(app, ["doctor", *arguments])
    report = json.loads(result.stdout)
    assert result.exit_code == 1
    assert alarms(report) == {("warning", "target-layer-convention")}
    (found,) = (one for one in report["findings"] if one["id"] == "target-layer-convention")
    assert f"every target layer id {shift}" in found["seen"]
    assert found["change"] == "set target_layer_ids to [1, 3, 5, 6]"


def test_a_run_of_the_good_pair_raises_no_alarm(one_thread: None) -> None:
    result = CliRunner().invoke(app, ["doctor", "--run", "8", "--json"])
    report = json.loads(result.stdout)
    assert (result.exit_code, alarms(report)) == (0, set())
    runs = {run["shift"]: run for run in report["measurement"]["runs"]}
    assert set(runs) == {0, -1, 1}
    # The drafter's card says 5.66 over all 64 prompts.
    assert 4.5 < runs[0]["acceptance_length"] < 7.0


def test_a_run_compares_both_template_modes(pair: Path, one_thread: None) -> None:
    template = "{% if enable_thinking %}<think>{% endif %}{{ messages[0]['content'] }}"
    edit(pair / "target/tokenizer_config.json", chat_template=template)
    _, report = doctor(pair, "--run", "1", "--max-tokens", "16")
    runs = [(run["shift"], run["mode"]) for run in report["measurement"]["runs"]]
    assert runs == [(0, "thinking"), (-1, "thinking"), (1, "thinking"), (0, "no thinking")]
    (told,) = (one for one in report["findings"] if one["id"] == "thinking")
    assert told["seen"].startswith("acceptance length")


def test_a_pair_that_cannot_be_run_says_why(pair: Path) -> None:
    drafter(dflash_config={"mask_token_id": 9999})(pair)
    code, report = doctor(pair, "--run", "1")
    assert code == 2
    assert alarms(report) == {("error", "mask-token"), ("error", "measurement")}


def test_a_drafter_of_noise_is_found_by_running(pair: Path, one_thread: None) -> None:
    def noise(content: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, tensor in content.items():
            if tensor.ndim == 2:
                content[name] = (0.05 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)

    tensors(noise)(pair)
    code, report = doctor(pair, "--run", "2", "--max-tokens", "32")
    assert code == 1
    assert ("warning", "acceptance") in alarms(report)
