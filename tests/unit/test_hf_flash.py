# SPDX-License-Identifier: Apache-2.0
"""Targets on FlashAttention. The package runs on GPUs alone; what stands in for it here keeps to its contract:

no mask, and causal from the last row and the last key backwards (flash-attn's README, "Changes", version 2.1).
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch
from transformers import Qwen3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.helpers import drafter, target

PROMPT = torch.tensor([[5, 9, 2, 40, 7]])


def causal_from_the_end(module, query, key, value, attention_mask, scaling, **_):
    assert attention_mask is None
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    rows, keys = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
    visible = keys <= rows + key.shape[2] - query.shape[2]
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~visible, float("-inf"))
    return (scores.softmax(dim=-1) @ value).transpose(1, 2), None


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Qwen3ForCausalLM:
    model = target()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", causal_from_the_end)
    monkeypatch.setattr(model.config, "_attn_implementation", "flash_attention_2")
    return model


def test_a_chain_says_what_the_target_says(model: Qwen3ForCausalLM) -> None:
    expected = target().generate(PROMPT, do_sample=False, max_new_tokens=30, pad_token_id=0)
    assert torch.equal(drafter(block_size=5).spec_generate(PROMPT, model, 30), expected)


def test_a_padded_prompt(model: Qwen3ForCausalLM) -> None:
    expected = target().generate(PROMPT, do_sample=False, max_new_tokens=12, pad_token_id=0)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), PROMPT), dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    got = drafter(block_size=5).spec_generate(padded, model, 12, attention_mask=mask)
    assert torch.equal(got[:, 3:], expected)


@pytest.mark.parametrize(
    ("batch", "options", "needs"),
    [(1, {"tree_budget": 7}, "a draft tree"), (1, {"tree_budget": "auto"}, "a draft tree"), (2, {}, "2 sequences")],
    ids=["tree", "auto", "batch"],
)
def test_what_needs_a_mask(model: Qwen3ForCausalLM, batch: int, options: dict, needs: str) -> None:
    with pytest.raises(ValueError, match=f"'flash_attention_2' takes no mask, which {needs} needs.*'sdpa'"):
        drafter().spec_generate(PROMPT.repeat(batch, 1), model, 4, **options)
