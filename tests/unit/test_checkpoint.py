# SPDX-License-Identifier: Apache-2.0
"""Which tensors a drafter checkpoint must have, and what is said when it has others."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
import torch

from tests.helpers import drafter_config, truncate, write_tensors
from vllm_dflash.checkpoint import (
    check_tensors,
    expected_tensors,
    read_mask_embedding,
    read_tensor_shapes,
    resolve_model_dir,
)
from vllm_dflash.config import DFlashConfig

#: By hand, for one layer: hidden 48, 2 taps of width 56, 4 query and 2 key heads of 32 channels, intermediate 80.
ONE_LAYER = {
    "fc.weight": (48, 112),
    "hidden_norm.weight": (48,),
    "norm.weight": (48,),
    "layers.0.input_layernorm.weight": (48,),
    "layers.0.post_attention_layernorm.weight": (48,),
    "layers.0.self_attn.q_proj.weight": (128, 48),
    "layers.0.self_attn.k_proj.weight": (64, 48),
    "layers.0.self_attn.v_proj.weight": (64, 48),
    "layers.0.self_attn.o_proj.weight": (48, 128),
    "layers.0.self_attn.q_norm.weight": (32,),
    "layers.0.self_attn.k_norm.weight": (32,),
    "layers.0.mlp.gate_proj.weight": (80, 48),
    "layers.0.mlp.up_proj.weight": (80, 48),
    "layers.0.mlp.down_proj.weight": (48, 80),
}
BIASES = {
    "layers.0.self_attn.q_proj.bias": (128,),
    "layers.0.self_attn.k_proj.bias": (64,),
    "layers.0.self_attn.v_proj.bias": (64,),
    "layers.0.self_attn.o_proj.bias": (48,),
}
REDUCED_VOCABULARY = {"d2t": (40,), "lm_head.weight": (40, 48)}


def one_layer(**changes: Any) -> DFlashConfig:
    raw = drafter_config(num_hidden_layers=1, target_hidden_size=56, **changes)
    return DFlashConfig.from_dict(raw, source="/drafters/tiny")


def complaint(config: DFlashConfig, found: dict[str, tuple[int, ...]]) -> str:
    with pytest.raises(ValueError) as caught:
        check_tensors(config, found)
    assert str(caught.value).startswith("/drafters/tiny: ")
    return str(caught.value)


def without(*names: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in ONE_LAYER.items() if name not in names}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ONE_LAYER),
        ({"attention_bias": True}, ONE_LAYER | BIASES),
        ({"draft_vocab_size": 40}, ONE_LAYER | REDUCED_VOCABULARY),
    ],
    ids=["plain", "attention bias", "reduced vocabulary"],
)
def test_expected_tensors(changes: dict[str, Any], expected: dict[str, tuple[int, ...]]) -> None:
    config = one_layer(**changes)
    assert expected_tensors(config) == expected
    check_tensors(config, expected)


def test_every_layer_has_its_own_tensors() -> None:
    raw = drafter_config(num_hidden_layers=3)
    names = expected_tensors(DFlashConfig.from_dict(raw)).keys()
    assert {name for name in names if name.endswith("k_norm.weight")} == {
        "layers.0.self_attn.k_norm.weight",
        "layers.1.self_attn.k_norm.weight",
        "layers.2.self_attn.k_norm.weight",
    }
    assert len(names) == 3 + 3 * 11


@pytest.mark.parametrize("num_shards", [1, 3])
def test_shapes_are_read_from_all_shards(tmp_path: Path, num_shards: int) -> None:
    assert read_tensor_shapes(write_tensors(tmp_path, ONE_LAYER, num_shards)) == ONE_LAYER
    assert len(list(tmp_path.glob("*.safetensors"))) == num_shards


def test_missing_tensors_are_all_named() -> None:
    message = complaint(one_layer(), without("fc.weight", "layers.0.mlp.up_proj.weight"))
    assert message.endswith("missing tensor(s): fc.weight, layers.0.mlp.up_proj.weight")


def test_a_lost_shard_shows_as_missing_tensors(tmp_path: Path) -> None:
    write_tensors(tmp_path, ONE_LAYER, num_shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "missing tensor(s): " in complaint(one_layer(), read_tensor_shapes(tmp_path))


def write_index(directory: Path, *files: str) -> None:
    weight_map = {f"tensor.{i}": file for i, file in enumerate(files)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def test_files_beside_the_index_are_not_read(tmp_path: Path) -> None:
    write_tensors(tmp_path, ONE_LAYER, num_shards=2)
    (write_tensors(tmp_path, {"other.layout": (1,)}) / "model-00001-of-00001.safetensors").rename(
        tmp_path / "consolidated.safetensors"
    )
    write_index(tmp_path, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert read_tensor_shapes(tmp_path) == ONE_LAYER


def test_a_lost_shard_of_an_index_is_named(tmp_path: Path) -> None:
    write_index(write_tensors(tmp_path, ONE_LAYER), "model-00001-of-00001.safetensors", "model-00002.safetensors")
    with pytest.raises(ValueError, match="names files that are not there: model-00002.safetensors"):
        read_tensor_shapes(tmp_path)


def test_a_shard_that_is_no_file_is_named(tmp_path: Path) -> None:
    (write_tensors(tmp_path, ONE_LAYER) / "model-2.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"model-2\.safetensors is not a readable safetensors file"):
        read_tensor_shapes(tmp_path)


def test_wrong_shape() -> None:
    message = complaint(one_layer(), ONE_LAYER | {"fc.weight": (48, 96)})
    assert "'fc.weight' has shape [48, 96], config.json implies [48, 112]" in message


def test_extra_tensor() -> None:
    message = complaint(one_layer(), ONE_LAYER | {"layers.1.mlp.up_proj.weight": (80, 48)})
    assert "'layers.1.mlp.up_proj.weight' [80, 48] belongs to no part of this drafter" in message


def test_biases_that_the_config_does_not_mention() -> None:
    assert "'layers.0.self_attn.k_proj.bias' [64]" in complaint(one_layer(), ONE_LAYER | BIASES)


def test_biases_that_the_checkpoint_lacks() -> None:
    message = complaint(one_layer(attention_bias=True), ONE_LAYER)
    assert all(name in message for name in BIASES)


@pytest.mark.parametrize("name", REDUCED_VOCABULARY)
def test_reduced_vocabulary_needs_map_and_head(name: str) -> None:
    found = ONE_LAYER | {other: shape for other, shape in REDUCED_VOCABULARY.items() if other != name}
    assert complaint(one_layer(draft_vocab_size=40), found).endswith(f"missing tensor(s): {name}")


def test_map_of_another_vocabulary() -> None:
    message = complaint(one_layer(draft_vocab_size=40), ONE_LAYER | {"d2t": (41,), "lm_head.weight": (40, 48)})
    assert "'d2t' has shape [41], config.json implies [40]" in message


@pytest.mark.parametrize(
    "extra",
    [
        {"embed_tokens.weight": (96, 48)},
        {"lm_head.weight": (96, 48)},
        {"embed_tokens.weight": (96, 48), "lm_head.weight": (96, 48), "d2t": (96,)},
        {"t2d": (96,), "rotary_emb.inv_freq": (16,), "layers.0.self_attn.rotary_emb.inv_freq": (16,)},
    ],
    ids=["own embedding", "own head", "all own", "leftovers of trainers"],
)
def test_optional_tensors_may_come_along(extra: dict[str, tuple[int, ...]]) -> None:
    check_tensors(one_layer(), ONE_LAYER | extra)


def test_own_embedding_of_another_vocabulary() -> None:
    message = complaint(one_layer(), ONE_LAYER | {"embed_tokens.weight": (100, 48)})
    assert "'embed_tokens.weight' has shape [100, 48], config.json implies [96, 48]" in message


@pytest.mark.parametrize("content", ["half", b"", b"no safetensors at all"])
def test_broken_file_is_named(tmp_path: Path, content: bytes | str) -> None:
    file = write_tensors(tmp_path, ONE_LAYER, num_shards=2) / "model-00002-of-00002.safetensors"
    if content == "half":
        truncate(file)
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match="is not a readable safetensors file") as caught:
        read_tensor_shapes(tmp_path)
    assert str(file) in str(caught.value)


def test_directory_without_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="no \\*.safetensors in the drafter's directory") as caught:
        read_tensor_shapes(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_directory_is_its_own_model_dir(tmp_path: Path) -> None:
    assert resolve_model_dir(str(tmp_path)) == tmp_path


# mask_embedding.pt, beside the safetensors.

EMBEDDING = [0.5 * i for i in range(48)]


@pytest.mark.parametrize(
    "content",
    [
        torch.tensor(EMBEDDING),
        torch.tensor([EMBEDDING]),
        {"embedding": torch.tensor(EMBEDDING)},
        {"embedding": torch.tensor([EMBEDDING]), "mask_token_id": 95},
    ],
    ids=["vector", "row", "dict", "dict with id"],
)
def test_mask_embedding(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "mask_embedding.pt")
    embedding = read_mask_embedding(tmp_path, one_layer())
    assert embedding is not None
    assert embedding.tolist() == EMBEDDING


def test_no_mask_embedding(tmp_path: Path) -> None:
    assert read_mask_embedding(tmp_path, one_layer()) is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"embedding": torch.zeros(48), "mask_token_id": 94}, "mask_token_id = 94, config.json says 95"),
        (torch.zeros(47), "embedding of shape [47], hidden_size = 48"),
        ({"embedding": torch.zeros(2, 48)}, "embedding of shape [2, 48], hidden_size = 48"),
        ({"weight": torch.zeros(48)}, "no embedding"),
        ([0.0] * 48, "no embedding"),
    ],
    ids=["other token", "too short", "two rows", "other key", "list"],
)
def test_mask_embedding_that_is_not_ours(tmp_path: Path, content: Any, problem: str) -> None:
    torch.save(content, tmp_path / "mask_embedding.pt")
    with pytest.raises(ValueError) as caught:
        read_mask_embedding(tmp_path, one_layer())
    assert str(tmp_path / "mask_embedding.pt") in str(caught.value)
    assert problem in str(caught.value)


def test_broken_mask_embedding_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mask_embedding.pt"
    torch.save(torch.zeros(48), file)
    truncate(file)
    with pytest.raises(ValueError, match="is not a readable PyTorch file") as caught:
        read_mask_embedding(tmp_path, one_layer())
    assert str(file) in str(caught.value)
