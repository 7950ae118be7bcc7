# SPDX-License-Identifier: Apache-2.0
"""Grouped attention against softmax written out, with K/V heads repeated."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch

from tests.helpers import target
from vllm_dflash.hf import attention
from vllm_dflash.hf.attention import grouped_attention, grouped_heads

BATCH, HEADS, KV_HEADS, ROWS, SLOTS, DIM = 2, 6, 2, 3, 7, 8


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((BATCH, HEADS, ROWS, DIM), (BATCH, KV_HEADS, SLOTS, DIM), (BATCH, KV_HEADS, SLOTS, DIM))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def written_out(query, key, value, visible, scale) -> torch.Tensor:
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3)) * scale
    return scores.masked_fill(~visible, float("-inf")).softmax(dim=-1) @ value


@pytest.mark.parametrize("scale", [None, 0.3], ids=["default scale", "own scale"])
@pytest.mark.parametrize("rows", [ROWS, 1], ids=["a mask for each row", "one for all rows"])
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
@pytest.mark.parametrize("few_rows", [512, 1], ids=["decode", "prompt"])
def test_against_softmax(
    few_rows: int, additive: bool, rows: int, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "FEW_ROWS", few_rows)
    query, key, value = tensors()
    visible = torch.rand(BATCH, 1, rows, SLOTS, generator=torch.Generator().manual_seed(1)) < 0.6
    visible[..., 0] = True
    mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf")) if additive else visible
    got = grouped_attention(query, key, value, mask, scale)
    expected = written_out(query, key, value, visible, scale or DIM**-0.5)
    torch.testing.assert_close(got, expected)


def test_without_a_mask_all_see_all() -> None:
    query, key, value = tensors()
    visible = torch.ones(BATCH, 1, ROWS, SLOTS, dtype=torch.bool)
    expected = written_out(query, key, value, visible, DIM**-0.5)
    torch.testing.assert_close(grouped_attention(query, key, value, None), expected)


def test_values_of_another_size_than_keys() -> None:
    query, key, _ = tensors()
    value = torch.randn(BATCH, KV_HEADS, SLOTS, 5, generator=torch.Generator().manual_seed(2))
    visible = torch.ones(BATCH, 1, ROWS, SLOTS, dtype=torch.bool).tril(2)
    expected = written_out(query, key, value, visible, DIM**-0.5)
    torch.testing.assert_close(grouped_attention(query, key, value, visible), expected)


def test_a_target_has_its_own_attention_afterwards() -> None:
    model = target()
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(KeyError), grouped_heads(model):
        assert model.config._attn_implementation == "grouped_heads"
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_only_the_text_model_changes() -> None:
    """A target of several models, whose text model has its own attention."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = sizes | {"image_size": 28, "patch_size": 14}
    text = Gemma3TextConfig(**sizes, num_key_value_heads=1, head_dim=8, vocab_size=96)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config)
    configs = (model.config, model.config.text_config, model.config.vision_config)
    model.config.vision_config._attn_implementation = "eager"
    with grouped_heads(model):
        assert model.config.text_config._attn_implementation == "grouped_heads"
    assert [one._attn_implementation for one in configs] == ["sdpa", "sdpa", "eager"]
    model.config.text_config._attn_implementation = "eager"
    with grouped_heads(model):
        assert [one._attn_implementation for one in configs] == ["sdpa", "eager", "eager"]


def test_eager_targets_keep_theirs() -> None:
    model = target()
    model.set_attn_implementation("eager")
    with grouped_heads(model):
        assert model.config._attn_implementation == "eager"
