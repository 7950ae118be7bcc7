# SPDX-License-Identifier: Apache-2.0
"""The start-up checks: every refusal names what to change, with both values where two disagree."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import drafter_config, truncate, write_config, write_tensors
from vllm_dflash.checkpoint import expected_tensors
from vllm_dflash.config import DFlashConfig
from vllm_dflash.validation import (
    TargetFacts,
    check_checkpoint,
    check_own_tables,
    check_pair,
    check_split,
    resolve_num_speculative_tokens,
)

TARGET = TargetFacts(model="/targets/tiny", num_hidden_layers=6, hidden_size=48, vocab_size=96)


def config(**changes: Any) -> DFlashConfig:
    return DFlashConfig.from_dict(drafter_config(**changes), source="/drafters/tiny")


# K.


@pytest.mark.parametrize(("requested", "expected"), [(None, 15), (1, 1), (7, 7), (15, 15)])
def test_k_defaults_to_the_block_and_may_be_smaller(requested: int | None, expected: int) -> None:
    assert resolve_num_speculative_tokens(config(block_size=16), requested) == expected


@pytest.mark.parametrize("requested", [16, 40])
def test_k_beyond_the_block(requested: int) -> None:
    with pytest.raises(ValueError) as caught:
        resolve_num_speculative_tokens(config(block_size=16), requested)
    message = str(caught.value)
    assert f'--speculative-config\'s "num_speculative_tokens" = {requested}' in message
    assert "/drafters/tiny has block_size = 16" in message
    assert "at most 15" in message


@pytest.mark.parametrize("requested", [0, -1, True, "7", 7.0])
def test_k_that_is_no_number_of_tokens(requested: Any) -> None:
    with pytest.raises(ValueError) as caught:
        resolve_num_speculative_tokens(config(), requested)
    assert '--speculative-config\'s "num_speculative_tokens"' in str(caught.value)
    assert repr(requested) in str(caught.value)


# The pair.


def test_a_fitting_pair() -> None:
    check_pair(config(), TARGET)


@pytest.mark.parametrize(
    "changes",
    [
        {"dflash_config": {"target_layer_ids": [1, 5]}},  # the last layer there is
        {"num_target_layers": None},
        {"hidden_size": 56, "target_hidden_size": 48},
        {"draft_vocab_size": 40},
    ],
)
def test_what_may_differ(changes: dict[str, Any]) -> None:
    check_pair(config(**changes), TARGET)


@pytest.mark.parametrize(
    ("changes", "drafter_says", "target_says"),
    [
        (
            {"dflash_config": {"target_layer_ids": [1, 6]}},
            "dflash_config.target_layer_ids [1, 6] reach layer 6",
            "layers 0..5",
        ),
        ({"num_target_layers": 7}, "num_target_layers = 7", "the target /targets/tiny has 6"),
        ({"hidden_size": 56}, "width 56", "hidden_size = 48"),
        ({"target_hidden_size": 56}, "width 56", "hidden_size = 48"),
        ({"vocab_size": 100}, "vocab_size = 100", "the target /targets/tiny has 96"),
    ],
)
def test_a_pair_that_does_not_fit(changes: dict[str, Any], drafter_says: str, target_says: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_pair(config(**changes), TARGET)
    message = str(caught.value)
    assert message.startswith("/drafters/tiny: ")
    assert drafter_says in message
    assert "/targets/tiny" in message
    assert target_says in message


# A drafter of another width than its target.


@pytest.mark.parametrize(
    ("tensors", "missing"),
    [
        ({}, "its own embed_tokens.weight and lm_head.weight"),
        ({"embed_tokens.weight": (96, 56)}, "its own lm_head.weight"),
        ({"lm_head.weight": (96, 56)}, "its own embed_tokens.weight"),
    ],
)
def test_other_width_needs_own_tables(tensors: dict[str, Any], missing: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_own_tables(config(hidden_size=56, target_hidden_size=48), tensors)
    message = str(caught.value)
    assert "hidden_size = 56 differs from the target's 48" in message
    assert message.endswith(missing)


def test_other_width_with_own_tables() -> None:
    tables = {"embed_tokens.weight": (96, 56), "lm_head.weight": (96, 56)}
    check_own_tables(config(hidden_size=56, target_hidden_size=48), tables)


def test_same_width_needs_no_tables() -> None:
    check_own_tables(config(), {})


# The checkpoint's files.


def write(directory: Path, **changes: Any) -> DFlashConfig:
    """A drafter directory, complete but for tables of its own."""
    write_config(directory, drafter_config(**changes))
    read = DFlashConfig.from_pretrained(str(directory))
    pytest.importorskip("torch")
    write_tensors(directory, expected_tensors(read))
    return read


# Tensor parallelism.


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "num_ranks", "uneven"),
    [
        (4, 2, 80, 1, ""),
        (4, 2, 80, 2, ""),
        (4, 2, 80, 4, ""),  # a key/value head on two ranks each
        (6, 3, 80, 2, "num_key_value_heads = 3"),
        (6, 3, 80, 3, "intermediate_size = 80"),
        (3, 1, 80, 2, "num_attention_heads = 3"),
        (6, 6, 80, 4, "num_attention_heads = 6, num_key_value_heads = 6"),
    ],
)
def test_drafters_that_cannot_be_split(heads: int, kv_heads: int, width: int, num_ranks: int, uneven: str) -> None:
    drafter = config(num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=width)
    if not uneven:
        return check_split(drafter, num_ranks)
    with pytest.raises(ValueError) as caught:
        check_split(drafter, num_ranks)
    assert str(caught.value) == (
        f"/drafters/tiny: {uneven} cannot be split over the {num_ranks} tensor-parallel ranks: set "
        '--speculative-config\'s "draft_tensor_parallel_size" to 1, so that each holds the whole drafter'
    )


def test_a_whole_checkpoint(tmp_path: Path) -> None:
    check_checkpoint(write(tmp_path))


def test_checkpoint_of_another_config(tmp_path: Path) -> None:
    write(tmp_path)
    write_config(tmp_path, drafter_config(intermediate_size=64))
    with pytest.raises(ValueError, match=r"down_proj.weight' has shape \[48, 80\], config.json implies \[48, 64\]"):
        check_checkpoint(DFlashConfig.from_pretrained(str(tmp_path)))


def test_truncated_checkpoint(tmp_path: Path) -> None:
    read = write(tmp_path)
    truncate(tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match="truncated download"):
        check_checkpoint(read)


def test_checkpoint_of_another_width_without_own_tables(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its own embed_tokens.weight and lm_head.weight"):
        check_checkpoint(write(tmp_path, hidden_size=56, target_hidden_size=48))


def test_packed_weights_of_a_quantized_drafter_are_not_judged(tmp_path: Path) -> None:
    write_config(tmp_path, drafter_config(quantization_config={"quant_method": "awq"}))
    check_checkpoint(DFlashConfig.from_pretrained(str(tmp_path)))


def test_a_hub_id_is_not_looked_for_on_disk() -> None:
    check_checkpoint(DFlashConfig.from_dict(drafter_config(), source="somebody/some-drafter"))
