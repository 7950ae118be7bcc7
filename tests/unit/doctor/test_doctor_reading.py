# SPDX-License-Identifier: Apache-2.0
"""Files into facts: configs past their first error, weights by headers and samples, tokenizers, hub ids."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from tests.helpers import drafter_config, speculators_config, target_config, truncate, write_config
from vllm_dflash.doctor import hub, machine
from vllm_dflash.doctor.drafter_config import ReadConfig
from vllm_dflash.doctor.facts import Machine
from vllm_dflash.doctor.reading import UnreadableError, read_target, read_tokenizer
from vllm_dflash.doctor.weights import read_weights, sample_ranges


def keys_at_fault(raw: dict) -> list[str]:
    read = ReadConfig(raw, "draft", target_config())
    assert read.config is not None
    assert read.other_errors == []
    return [error.key for error in read.config_errors]


def test_a_good_config_has_no_errors() -> None:
    assert keys_at_fault(drafter_config()) == keys_at_fault(speculators_config()) == []


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"block_size": 1}, ["block_size"]),
        ({"hidden_size": "wide", "vocab_size": 0}, ["hidden_size", "vocab_size"]),
        ({"num_hidden_layers": 0, "layer_types": ["full_attention"] * 2}, ["num_hidden_layers"]),
        ({"layer_types": ["full_attention", "magic"]}, ["layer_types[1]"]),
        ({"layer_types": ["sliding_attention"] * 2}, ["sliding_window"]),
        ({"conv_kernel_size": 2, "selector_rank": 4}, ["conv_kernel_size", "selector_rank"]),
        ({"rope_parameters": {"full_attention": {}}}, ["rope_parameters"]),
        ({"num_target_layers": -1}, ["num_target_layers"]),
        ({"max_position_embeddings": "far"}, ["max_position_embeddings"]),
        (
            {"intermediate_size": None, "dflash_config": {"mask_token_id": None, "target_layer_ids": [3, 1]}},
            ["intermediate_size", "dflash_config.mask_token_id", "dflash_config.target_layer_ids"],
        ),
    ],
)
def test_every_key_at_fault_is_named(changes: dict, keys: list[str]) -> None:
    assert sorted(keys_at_fault(drafter_config(**changes))) == sorted(keys)


def test_speculators_layer_ids_at_fault_are_named_once() -> None:
    assert keys_at_fault(speculators_config(aux_hidden_state_layer_ids="all")) == ["aux_hidden_state_layer_ids"]


def test_the_targets_numbers_stand_in() -> None:
    read = ReadConfig(drafter_config(hidden_size=None, head_dim=None), "draft", target_config())
    assert read.config is not None
    assert (read.config.hidden_size, read.config.vocab_size) == (48, 96)


def test_what_is_no_keys_fault_is_told_too() -> None:
    read = ReadConfig(speculators_config() | {"transformer_layer_config": None}, "draft", target_config())
    assert "transformer_layer_config" in read.other_errors[0]
    read = ReadConfig(drafter_config(rms_norm_eps="tiny"), "draft", target_config())
    assert read.config is None
    assert "config.json cannot be read" in read.other_errors[0]


def test_headers_and_samples(tmp_path: Path) -> None:
    large = torch.ones(200_000, dtype=torch.bfloat16)
    save_file(
        {
            "zeros": torch.zeros(3, 4),
            "half": torch.tensor([1.0, float("inf")], dtype=torch.float16),
            "nan": torch.tensor([float("nan"), 1.0], dtype=torch.bfloat16),
            "ids": torch.tensor([7], dtype=torch.int64),
            "large": large,
        },
        tmp_path / "model.safetensors",
    )
    found = read_weights(tmp_path)
    assert found.problems == ()
    seen = {
        name: (one.shape, one.dtype, one.num_bytes, one.is_zero, one.is_finite) for name, one in found.tensors.items()
    }
    assert seen == {
        "zeros": ((3, 4), "F32", 48, True, True),
        "half": ((2,), "F16", 4, False, False),
        "nan": ((2,), "BF16", 4, False, False),
        "ids": ((1,), "I64", 8, False, True),
        "large": ((200_000,), "BF16", 400_000, False, True),
    }
    assert found.num_bytes == 48 + 4 + 4 + 8 + 400_000


def test_samples_are_the_beginning_the_middle_and_the_end() -> None:
    assert sample_ranges(10, 20) == [(10, 20)]
    assert sample_ranges(0, 1_000_000) == [(0, 65_536), (467_232, 532_768), (934_464, 1_000_000)]


def test_the_same_values_have_the_same_digest(tmp_path: Path) -> None:
    a, b = torch.arange(6.0), torch.arange(6.0) + 1
    save_file({"a": a, "again": a.clone(), "b": b}, tmp_path / "model.safetensors")
    tensors = read_weights(tmp_path).tensors
    assert tensors["a"].digest == tensors["again"].digest != tensors["b"].digest


def test_a_broken_shard_does_not_hide_the_others(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({name: torch.ones(100)}, tmp_path / f"{name}.safetensors")
    truncate(tmp_path / "b.safetensors")
    found = read_weights(tmp_path)
    assert set(found.tensors) == {"a"}
    (problem,) = found.problems
    assert str(tmp_path / "b.safetensors") in problem


@pytest.mark.parametrize("content", ["[]", "{not json", '{"weight_map": 3}'])
def test_a_broken_index_is_told(tmp_path: Path, content: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    (problem,) = read_weights(tmp_path).problems
    assert "model.safetensors.index.json" in problem


def test_files_that_the_index_does_not_name_are_no_weights(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    save_file({"a.in.another.layout": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    assert read_weights(tmp_path).num_bytes == 16
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    found = read_weights(tmp_path)
    assert (set(found.tensors), found.num_bytes, found.problems) == ({"a"}, 8, ())


def test_an_index_of_files_that_are_not_there(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    found = read_weights(tmp_path)
    assert (set(found.tensors), found.has_headers) == (set(), False)
    (problem,) = found.problems
    assert "names files that are not there: model-1.safetensors, model-2.safetensors" in problem


def test_weights_of_another_format_are_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    found = read_weights(tmp_path)
    assert not found.has_headers
    assert "pytorch_model.bin" in found.problems[0]


@pytest.mark.parametrize(
    ("content", "told"), [(None, "there is no"), ("{", "is not valid JSON"), ("[1]", "must hold a JSON object")]
)
def test_an_unreadable_config_is_named(tmp_path: Path, content: str | None, told: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UnreadableError, match=told) as raised:
        read_target("--target", "t", tmp_path)
    assert "config.json" in str(raised.value)


def test_the_decoder_of_a_nested_config(tmp_path: Path) -> None:
    write_config(tmp_path, {"architectures": ["V"], "thinker_config": {"text_config": {"hidden_size": 5}}})
    target = read_target("--target", "t", tmp_path)
    assert (target.number("hidden_size"), target.architectures) == (5, ("V",))


def test_end_tokens_of_both_files(tmp_path: Path) -> None:
    write_config(tmp_path, target_config(eos_token_id=2))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 2]}', encoding="utf-8")
    assert read_target("--target", "t", tmp_path).end_token_ids == (9, 2)


def test_a_tokenizer_from_its_files(tmp_path: Path) -> None:
    fast = {
        "model": {"vocab": {"dog": 5, "cat": 6}},
        "added_tokens": [{"id": 7, "content": "<eos>", "special": True}, {"id": 8, "content": "<tool>"}],
    }
    settings = {
        "eos_token": {"content": "<eos>"},
        "mask_token": "<mask>",
        "added_tokens_decoder": {"9": {"content": "<mask>", "special": True}},
        "chat_template": [{"name": "default", "template": "A"}, {"name": "tools", "template": "B"}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(fast), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text("{% if enable_thinking %}", encoding="utf-8")
    found = read_tokenizer(tmp_path)
    assert found is not None
    assert found.tokens == {5: "dog", 6: "cat", 7: "<eos>", 8: "<tool>", 9: "<mask>"}
    assert (found.special, found.mask_token, found.roles) == (frozenset({7, 9}), "<mask>", {"eos_token": 7})
    assert found.chat_templates == ("A", "B", "{% if enable_thinking %}")
    assert found.has_thinking_switch


@pytest.mark.parametrize(
    "content", ["{", '{"added_tokens": [3]}', '{"model": {"vocab": {"a": {}}}, "added_tokens": 3}']
)
def test_a_broken_tokenizer_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    found = read_tokenizer(tmp_path)
    assert found is not None
    assert str(tmp_path) in found.problem


def test_no_tokenizer(tmp_path: Path) -> None:
    assert read_tokenizer(tmp_path) is None


def test_a_directory_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    assert hub.locate("--target", str(tmp_path)) == (tmp_path, None)


def test_no_hub_id() -> None:
    with pytest.raises(UnreadableError, match="--draft: there is no directory /no/such/dir"):
        hub.locate("--draft", "/no/such/dir")


def test_only_small_files_and_headers_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def snapshot_download(model: str, **options: object) -> str:
        asked.update(options, model=model)
        return str(write_config(tmp_path, target_config()))

    entry = SimpleNamespace(shape=[2, 3], dtype="BF16", data_offsets=(100, 112))
    metadata = SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors={"fc.weight": entry})})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda model: metadata)
    directory, weights = hub.locate("--target", "owner/name")
    assert (directory, asked["model"], asked["allow_patterns"]) == (tmp_path, "owner/name", ["*.json", "*.jinja"])
    assert weights is not None
    tensor = weights.tensors["fc.weight"]
    assert (tensor.shape, tensor.num_bytes, tensor.is_zero) == ((2, 3), 12, None)


def test_a_hub_out_of_reach_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(model: str, **_: object) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UnreadableError, match="--target: .*owner/name, the hub cannot be reached"):
        hub.locate("--target", "owner/name")


def test_headers_out_of_reach_are_a_problem_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def get_safetensors_metadata(model: str) -> object:
        raise ConnectionError("gone")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda model, **_: str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", get_safetensors_metadata)
    _, weights = hub.locate("--target", "owner/name")
    assert weights is not None
    assert not weights.has_headers
    assert "owner/name" in weights.problems[0]
    assert "gone" in weights.problems[0]


def test_gpus_as_the_driver_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA A2, 15356'\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert machine.read_machine() == Machine((("NVIDIA H100 80GB HBM3", 85520809984), ("NVIDIA A2", 16101933056)))


def test_a_driver_that_fails_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 9\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert machine.read_machine() == Machine()
