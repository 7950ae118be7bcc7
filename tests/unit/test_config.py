# SPDX-License-Identifier: Apache-2.0
"""What is read from a drafter's config.json, in both layouts, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ABSENT, drafter_config, speculators_config, write_config
from vllm_dflash.config import DFlashConfig, LayerAttention, is_dflash_checkpoint, read_config_dict

FULL, SLIDING = "full_attention", "sliding_attention"

#: config.json of a published drafter for Qwen3-8B, without the keys that only Transformers reads.
QWEN3_8B = {
    "architectures": ["DFlashDraftModel"],
    "attention_bias": False,
    "block_size": 16,
    "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "layer_types": [FULL] * 5,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 5,
    "num_key_value_heads": 8,
    "num_target_layers": 36,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def parse(**changes: Any) -> DFlashConfig:
    return DFlashConfig.from_dict(drafter_config(**changes))


def complaint(raw: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:
        DFlashConfig.from_dict(raw, source="/drafters/tiny")
    return str(caught.value)


def test_published_layout() -> None:
    assert DFlashConfig.from_dict(QWEN3_8B, source="qwen3-8b") == DFlashConfig(
        block_size=16,
        mask_token_id=151669,
        target_layer_ids=(1, 9, 17, 25, 33),
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=5,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        draft_vocab_size=151936,
        target_hidden_size=4096,
        layers=(LayerAttention(sliding_window=None, causal=False),) * 5,
        rms_norm_eps=1e-06,
        hidden_act="silu",
        attention_bias=False,
        max_position_embeddings=40960,
        rope_parameters={"rope_theta": 1000000, "rope_type": "default"},
        is_neox_style=True,
        num_target_layers=36,
        is_quantized=False,
        source="qwen3-8b",
    )


def test_speculators_layout() -> None:
    raw = speculators_config(
        draft_vocab_size=40, target_hidden_size=56, quantization_config={"quant_method": "compressed-tensors"}
    )
    assert DFlashConfig.from_dict(raw, source="spec") == DFlashConfig(
        block_size=16,
        mask_token_id=95,
        target_layer_ids=(1, 3),  # aux_hidden_state_layer_ids [2, 4] count the embedding as 0
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=96,
        draft_vocab_size=40,
        target_hidden_size=56,
        layers=(LayerAttention(sliding_window=None, causal=False),) * 2,
        rms_norm_eps=1e-6,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        num_target_layers=None,
        is_quantized=True,
        source="spec",
    )


@pytest.mark.parametrize(
    ("taps", "aux_ids"), [([0], (1,)), ([1, 3], (2, 4)), ([1, 9, 17, 25, 33], (2, 10, 18, 26, 34))]
)
def test_layer_ids_become_aux_ids_by_adding_one(taps: list[int], aux_ids: tuple[int, ...]) -> None:
    assert parse(dflash_config={"target_layer_ids": taps}).aux_hidden_state_layer_ids == aux_ids


def test_aux_ids_of_a_speculators_drafter_come_back_unchanged() -> None:
    config = DFlashConfig.from_dict(speculators_config(aux_hidden_state_layer_ids=[1, 3, 6]))
    assert config.target_layer_ids == (0, 2, 5)
    assert config.aux_hidden_state_layer_ids == (1, 3, 6)


@pytest.mark.parametrize(("block_size", "num_speculative_tokens"), [(2, 1), (8, 7), (16, 15)])
def test_a_block_drafts_one_token_less_than_it_has_rows(block_size: int, num_speculative_tokens: int) -> None:
    assert parse(block_size=block_size).num_speculative_tokens == num_speculative_tokens


@pytest.mark.parametrize(
    ("num_target_layers", "num_draft_layers", "taps"),
    [
        (36, 5, (1, 9, 17, 25, 33)),  # the published drafters for Qwen3-4B and Qwen3-8B
        (32, 5, (1, 8, 15, 22, 29)),
        (48, 5, (1, 12, 23, 34, 45)),
        (28, 3, (1, 13, 25)),
        (8, 4, (1, 2, 4, 5)),  # 1, 2 1/3, 3 2/3, 5
        (24, 9, (1, 4, 6, 8, 11, 14, 16, 18, 21)),  # steps of 2.5; a half goes to the even neighbour
        (6, 2, (1, 3)),
        (36, 1, (18,)),
    ],
)
def test_default_taps(num_target_layers: int, num_draft_layers: int, taps: tuple[int, ...]) -> None:
    config = parse(
        num_target_layers=num_target_layers,
        num_hidden_layers=num_draft_layers,
        dflash_config={"target_layer_ids": ABSENT},
    )
    assert config.target_layer_ids == taps


def test_other_defaults() -> None:
    optional = ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta")
    config = parse(**dict.fromkeys((*optional, "num_target_layers"), ABSENT))
    assert (config.num_key_value_heads, config.head_dim) == (4, 12)  # as many as heads; 48 / 4
    assert (config.max_position_embeddings, config.rms_norm_eps) == (32768, 1e-6)
    assert config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}
    assert (config.draft_vocab_size, config.target_hidden_size) == (96, 48)  # vocab_size, hidden_size
    assert (config.hidden_act, config.attention_bias, config.is_neox_style) == ("silu", False, True)
    assert (config.num_target_layers, config.is_quantized, config.source) == (None, False, "<dict>")


def test_older_places_of_block_size_and_mask_id() -> None:
    config = parse(block_size=ABSENT, mask_token_id=7, dflash_config={"block_size": 4, "mask_token_id": ABSENT})
    assert (config.block_size, config.mask_token_id) == (4, 7)


# RoPE: the same settings have had three homes and two spellings.

ROPE_SETTINGS = {
    "theta": (
        {"rope_theta": 1e6},
        {"rope_theta": ABSENT, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"rope_theta": 1e6},
    ),
    "scaling": (
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_theta": ABSENT, "rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    ),
    "partial rotary": (
        {"rope_theta": 1e6, "partial_rotary_factor": 0.5},
        {"rope_theta": ABSENT, "rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}},
    ),
}
ROPE_EXPECTED = {
    "theta": {"rope_theta": 1e6, "rope_type": "default"},
    "scaling": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0},
    "partial rotary": {"rope_theta": 1e6, "rope_type": "default", "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("setting", ROPE_SETTINGS)
def test_rope_settings_read_the_same_from_every_home(setting: str) -> None:
    for home in ROPE_SETTINGS[setting]:
        assert parse(**home).rope_parameters == ROPE_EXPECTED[setting], home


@pytest.mark.parametrize(("factor", "rotary_dim"), [(ABSENT, 32), (1.0, 32), (0.5, 16), (0.25, 8)])
def test_rotary_dim(factor: Any, rotary_dim: int) -> None:
    assert parse(partial_rotary_factor=factor).rotary_dim == rotary_dim


def test_rope_by_layer_type_is_refused() -> None:
    rope = {FULL: {"rope_theta": 1e6}, SLIDING: {"rope_theta": 1e4}}
    assert "'rope_parameters' differs between layer types" in complaint(drafter_config(rope_parameters=rope))


# Attention: an explicit causality wins; else exactly the layers declared sliding are causal.

TWO_FULL = {"layer_types": [FULL, FULL], "sliding_window": 8}
TWO_SLIDING = {"layer_types": [SLIDING, SLIDING], "sliding_window": 8}
MIXED = {"layer_types": [SLIDING, FULL], "sliding_window": 8}


@pytest.mark.parametrize(
    ("layers", "changes", "expected"),
    [
        # (window, causal) of both layers
        ({}, {}, [(None, False), (None, False)]),
        (TWO_FULL, {}, [(None, False), (None, False)]),
        (TWO_SLIDING, {}, [(8, True), (8, True)]),
        (MIXED, {}, [(8, True), (None, False)]),
        # explicit, in either place
        (MIXED, {"is_causal": False}, [(8, False), (None, False)]),
        (MIXED, {"is_causal": True}, [(8, True), (None, True)]),
        (MIXED, {"dflash_config": {"causal": False}}, [(8, False), (None, False)]),
        (MIXED, {"dflash_config": {"causal": True}}, [(8, True), (None, True)]),
        (TWO_FULL, {"is_causal": True}, [(None, True), (None, True)]),
        # is_causal before dflash_config.causal; null says nothing
        (MIXED, {"is_causal": False, "dflash_config": {"causal": True}}, [(8, False), (None, False)]),
        (MIXED, {"is_causal": None, "dflash_config": {"causal": False}}, [(8, False), (None, False)]),
        (MIXED, {"is_causal": None, "dflash_config": {"causal": None}}, [(8, True), (None, False)]),
        # use_swa slides all layers unless the layers say themselves which do, and makes none of them causal
        ({"sliding_window": 8}, {"dflash_config": {"use_swa": True}}, [(8, False), (8, False)]),
        (TWO_FULL, {"dflash_config": {"use_swa": True}}, [(8, False), (8, False)]),
        (TWO_FULL, {"dflash_config": {"use_swa": False}}, [(None, False), (None, False)]),
        (MIXED, {"dflash_config": {"use_swa": True}}, [(8, True), (None, False)]),
        (TWO_FULL, {"dflash_config": {"use_swa": True, "causal": True}}, [(8, True), (8, True)]),
        # the drafter's own window before the general one
        (MIXED, {"dflash_config": {"swa_window_size": 5}}, [(5, True), (None, False)]),
        (MIXED, {"use_sliding_window": True}, [(8, True), (None, False)]),
    ],
)
def test_window_and_causality(
    layers: dict[str, Any], changes: dict[str, Any], expected: list[tuple[int | None, bool]]
) -> None:
    assert parse(**layers, **changes).layers == tuple(LayerAttention(*layer) for layer in expected)


@pytest.mark.parametrize(
    ("sliding_window_non_causal", "expected"),
    [
        (ABSENT, [(8, False), (None, False)]),
        (True, [(8, False), (None, False)]),
        (False, [(8, True), (None, False)]),  # speculators trains full layers bidirectional whatever this says
    ],
)
def test_causality_of_a_speculators_drafter(sliding_window_non_causal: Any, expected: list) -> None:
    raw = speculators_config(sliding_window_non_causal=sliding_window_non_causal, transformer_layer_config=MIXED)
    assert DFlashConfig.from_dict(raw).layers == tuple(LayerAttention(*layer) for layer in expected)


# Refusals. Each names the source, the key and the value found.

TOO_MANY_LAYER_TYPES = [FULL, FULL, FULL]


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        # not a size
        ({"hidden_size": ABSENT}, "hidden_size", "None"),
        ({"hidden_size": 0}, "hidden_size", "0"),
        ({"hidden_size": True}, "hidden_size", "True"),
        ({"hidden_size": "48"}, "hidden_size", "'48'"),
        ({"hidden_size": 48.0}, "hidden_size", "48.0"),
        ({"intermediate_size": -1}, "intermediate_size", "-1"),
        ({"num_hidden_layers": True}, "num_hidden_layers", "True"),
        ({"num_attention_heads": "4"}, "num_attention_heads", "'4'"),
        ({"num_key_value_heads": 0}, "num_key_value_heads", "0"),
        ({"head_dim": 0}, "head_dim", "0"),
        ({"vocab_size": ABSENT}, "vocab_size", "None"),
        ({"draft_vocab_size": 0}, "draft_vocab_size", "0"),
        ({"target_hidden_size": "48"}, "target_hidden_size", "'48'"),
        ({"max_position_embeddings": 0}, "max_position_embeddings", "0"),
        ({"num_target_layers": "6"}, "num_target_layers", "'6'"),
        # no block
        ({"block_size": ABSENT}, "block_size", "None"),
        ({"block_size": 1}, "block_size", "1"),
        ({"block_size": True}, "block_size", "True"),
        ({"block_size": "16"}, "block_size", "'16'"),
        # the wrong mask: acceptance would collapse without a word
        ({"dflash_config": {"mask_token_id": 96}}, "dflash_config.mask_token_id", "96"),
        ({"dflash_config": {"mask_token_id": -1}}, "dflash_config.mask_token_id", "-1"),
        ({"dflash_config": {"mask_token_id": True}}, "dflash_config.mask_token_id", "True"),
        ({"dflash_config": {"mask_token_id": "95"}}, "dflash_config.mask_token_id", "'95'"),
        # taps that are no layers, or whose order is in doubt
        ({"dflash_config": {"target_layer_ids": []}}, "dflash_config.target_layer_ids", "[]"),
        ({"dflash_config": {"target_layer_ids": 3}}, "dflash_config.target_layer_ids", "3"),
        ({"dflash_config": {"target_layer_ids": [3, 1]}}, "dflash_config.target_layer_ids", "[3, 1]"),
        ({"dflash_config": {"target_layer_ids": [1, 1]}}, "dflash_config.target_layer_ids", "[1, 1]"),
        ({"dflash_config": {"target_layer_ids": [-1, 3]}}, "dflash_config.target_layer_ids", "[-1, 3]"),
        ({"dflash_config": {"target_layer_ids": ["1", "3"]}}, "dflash_config.target_layer_ids", "['1', '3']"),
        ({"dflash_config": {"target_layer_ids": [True, 3]}}, "dflash_config.target_layer_ids", "[True, 3]"),
        # attention that is not there, or contradicts itself
        ({"layer_types": TOO_MANY_LAYER_TYPES}, "layer_types", "3 layers, but num_hidden_layers = 2"),
        ({"layer_types": [FULL, "linear_attention"]}, "layer_types[1]", "'linear_attention'"),
        ({"layer_types": [FULL, SLIDING]}, "sliding_window", "None"),
        ({"dflash_config": {"use_swa": True}}, "sliding_window", "None"),
        (MIXED | {"sliding_window": 0}, "sliding_window", "0"),
        (MIXED | {"sliding_window": True}, "sliding_window", "True"),
        (MIXED | {"use_sliding_window": False}, "use_sliding_window", "false"),
        # arithmetic that this implementation does not have
        ({"attention_sink_bias": True}, "attention_sink_bias", "True"),
        ({"attention_value_scale": 0.5}, "attention_value_scale", "0.5"),
        ({"dflash_config": {"sample_from_anchor": True}}, "sample_from_anchor", "True"),
        ({"dflash_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state", "False"),
        ({"conv_kernel_size": 2}, "conv_kernel_size", "2"),
        ({"selector_rank": 256}, "selector_rank", "256"),
    ],
)
def test_refused(changes: dict[str, Any], key: str, value: str) -> None:
    message = complaint(drafter_config(**changes))
    assert message.startswith(f"/drafters/tiny: config.json key '{key}' ")
    assert value in message.removeprefix(f"/drafters/tiny: config.json key '{key}' ")


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"mask_token_id": 96}, "mask_token_id", "96"),
        ({"aux_hidden_state_layer_ids": [0, 2]}, "aux_hidden_state_layer_ids", "[0, 2]"),
        ({"aux_hidden_state_layer_ids": ["2"]}, "aux_hidden_state_layer_ids", "['2']"),
        ({"aux_hidden_state_layer_ids": 2}, "aux_hidden_state_layer_ids", "2"),
        ({"aux_hidden_state_layer_ids": [4, 2]}, "aux_hidden_state_layer_ids", "[4, 2]"),
        ({"sample_from_anchor": True}, "sample_from_anchor", "True"),
        ({"projector_type": "domino"}, "projector_type", "'domino'"),
        ({"shift_label": True}, "shift_label", "True"),
        ({"transformer_layer_config": {"vocab_size": 0}}, "vocab_size", "0"),
    ],
)
def test_refused_in_the_speculators_layout(changes: dict[str, Any], key: str, value: str) -> None:
    message = complaint(speculators_config(**changes))
    assert message.startswith("/drafters/tiny: ")
    assert key in message
    assert value in message


@pytest.mark.parametrize(
    "unused",
    [
        {"attention_sink_bias": False, "attention_value_scale": 1.0, "conv_kernel_size": 0, "selector_rank": None},
        {"dflash_config": {"sample_from_anchor": False, "use_aux_hidden_state": True}},
    ],
)
def test_values_that_mean_not_in_use_are_not_refused(unused: dict[str, Any]) -> None:
    assert parse(**unused) == parse()


def test_speculators_values_that_mean_not_in_use_are_not_refused() -> None:
    raw = speculators_config(sample_from_anchor=False, projector_type="dflash", shift_label=False)
    assert DFlashConfig.from_dict(raw) == DFlashConfig.from_dict(speculators_config())


def test_missing_mask_id_says_so() -> None:
    for raw in (drafter_config(dflash_config={"mask_token_id": ABSENT}), speculators_config(mask_token_id=ABSENT)):
        assert "'dflash_config.mask_token_id' is missing" in complaint(raw)


def test_taps_that_cannot_be_derived_are_asked_for() -> None:
    raw = drafter_config(num_target_layers=ABSENT, dflash_config={"target_layer_ids": ABSENT})
    message = complaint(raw)
    assert "'dflash_config.target_layer_ids' is missing" in message
    assert "num_target_layers" in message


@pytest.mark.parametrize("num_target_layers", [2, 4])  # 1 .. -1, and 1 .. 1
def test_default_taps_of_a_shallow_target_are_not_made_up(num_target_layers: int) -> None:
    message = complaint(drafter_config(num_target_layers=num_target_layers, dflash_config={"target_layer_ids": ABSENT}))
    assert "dflash_config.target_layer_ids" in message
    assert f"num_target_layers = {num_target_layers}" in message


@pytest.mark.parametrize("value", [["mask_token_id", 95], "95", 95], ids=["list", "str", "int"])
def test_dflash_config_must_be_an_object(value: Any) -> None:
    message = complaint(drafter_config() | {"dflash_config": value})
    assert "'dflash_config'" in message
    assert repr(value) in message


@pytest.mark.parametrize("layer_config", [ABSENT, None, [1]])
def test_speculators_layout_without_its_layer_config(layer_config: Any) -> None:
    raw = speculators_config()
    del raw["transformer_layer_config"]
    if layer_config is not ABSENT:
        raw["transformer_layer_config"] = layer_config
    assert "transformer_layer_config" in complaint(raw)


# Files.


def test_reads_a_directory(tmp_path: Path) -> None:
    config = DFlashConfig.from_pretrained(str(write_config(tmp_path / "drafter", drafter_config(block_size=4))))
    assert (config.block_size, config.source) == (4, str(tmp_path / "drafter"))


def test_directory_without_config_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no config.json in") as caught:
        read_config_dict(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "--speculative-config" in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"", b'{"hidden_size": \xff}'])
def test_config_json_that_is_not_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="is not valid JSON") as caught:
        read_config_dict(str(tmp_path))
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(("content", "kind"), [([1], "list"), ("x", "str"), (None, "NoneType")])
def test_config_json_that_is_not_an_object(tmp_path: Path, content: Any, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=f"found a {kind}") as caught:
        read_config_dict(str(tmp_path))
    assert str(tmp_path / "config.json") in str(caught.value)


def test_neither_directory_nor_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="neither a local directory nor a readable hub id") as caught:
        read_config_dict("nobody/there-is-no-such-drafter")
    assert "'nobody/there-is-no-such-drafter'" in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"architectures": ["DFlashDraftModel"]}, True),
        ({"architectures": ["DFlash2DraftModel"]}, False),
        ({"architectures": ["LiLiCorrDraftModel"]}, False),
        ({"architectures": ["Qwen3DSparkModel"]}, False),
        ({"architectures": ["DSparkDraftModel"]}, False),
        ({"architectures": ["Qwen3ForCausalLM"]}, False),
        ({"architectures": ["DFlashDraftModel", "Qwen3ForCausalLM"]}, False),
        ({"architectures": []}, False),
        ({"architectures": None}, False),
        ({}, False),
        # speculators: the type decides, whatever the architectures say
        ({"speculators_model_type": "dflash", "architectures": ["DFlashSpeculator"]}, True),
        ({"speculators_model_type": "dflash"}, True),
        ({"speculators_model_type": "dflash2", "architectures": ["DFlashDraftModel"]}, False),
        ({"speculators_model_type": "dspark", "architectures": ["DFlashDraftModel"]}, False),
        ({"speculators_model_type": "eagle3"}, False),
        ({"speculators_model_type": None, "architectures": ["DFlashDraftModel"]}, True),
    ],
)
def test_whose_checkpoint_it_is(raw: dict[str, Any], expected: bool) -> None:
    assert is_dflash_checkpoint(raw) is expected
