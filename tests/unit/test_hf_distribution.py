# SPDX-License-Identifier: Apache-2.0
"""At temperature 1 what `spec_generate` says is distributed as what the target says: chi-square, exact probabilities.

A toy target over 8 tokens, so that the probability of every continuation can be computed. False-alarm rate of a test:
ALPHA. Their power is shown by a planted bias that they must reject.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("scipy")
import torch
from scipy.stats import chisquare
from transformers import Qwen3ForCausalLM

from tests.helpers import drafter, target
from vllm_dflash.hf import SpecGenerateOutput
from vllm_dflash.hf import round as round_

pytestmark = pytest.mark.usefixtures("one_thread")

ALPHA = 1e-4
VOCAB, LENGTH, SAMPLES, BATCH = 8, 3, 8000, 1000
PROMPT = [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return target(vocab_size=VOCAB)


@pytest.fixture(scope="module")
def exact(model: Qwen3ForCausalLM) -> dict[tuple[int, ...], float]:
    return exact_probabilities(model, {})


def exact_probabilities(model: Qwen3ForCausalLM, tempering: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """P(continuation) of every sequence of LENGTH tokens, by the chain rule."""
    continuations = list(itertools.product(range(VOCAB), repeat=LENGTH))
    with torch.no_grad():
        ids = torch.tensor([PROMPT + list(c) for c in continuations])
        logits = model(ids).logits[:, len(PROMPT) - 1 : -1]
    probs = torch.stack([allowed(row, tempering) for row in logits.flatten(0, 1)]).view_as(logits)
    chosen = torch.tensor(continuations)[..., None]
    return dict(zip(continuations, probs.gather(-1, chosen).prod(dim=1)[:, 0].tolist(), strict=True))


def allowed(logits: torch.Tensor, tempering: dict[str, Any]) -> torch.Tensor:
    """A row's distribution, [V]: tempered, and of it the likeliest tokens alone."""
    probs = (logits / tempering.get("temperature", 1.0)).softmax(dim=-1)
    order = probs.argsort(descending=True)
    keep = len(order)
    if "top_k" in tempering:
        keep = tempering["top_k"]
    if "top_p" in tempering:
        keep = 1 + int((probs[order].cumsum(dim=0) < tempering["top_p"]).sum())
    return torch.zeros_like(probs).index_copy(0, order[:keep], probs[order[:keep]] / probs[order[:keep]].sum())


def sample(model: Qwen3ForCausalLM, options: dict[str, Any]) -> tuple[list[tuple[int, ...]], float]:
    """Continuations of the prompt, and the acceptance length."""
    draft = drafter(vocab_size=VOCAB, block_size=4, dflash_config={"mask_token_id": VOCAB - 1})
    generator = torch.Generator().manual_seed(0)
    found: list[tuple[int, ...]] = []
    lengths: list[int] = []
    for _ in range(SAMPLES // BATCH):
        output = draft.spec_generate(
            torch.tensor([PROMPT] * BATCH), model, LENGTH, generator=generator, return_stats=True,
            **({"temperature": 1.0} | options),
        )  # fmt: skip
        assert isinstance(output, SpecGenerateOutput)
        found += map(tuple, output.sequences[:, len(PROMPT) :].tolist())
        lengths += output.acceptance_lengths
    return found, sum(lengths) / len(lengths)


def p_value(found: list[tuple[int, ...]], exact: dict[tuple[int, ...], float]) -> float:
    """Of the observed continuations; rare ones pooled so that every cell expects at least 10."""
    counts, total = Counter(found), len(found)
    common = [c for c, p in exact.items() if p * total >= 10]
    observed = [counts[c] for c in common]
    expected = [exact[c] * total for c in common]
    return chisquare([*observed, total - sum(observed)], [*expected, total - sum(expected)]).pvalue


METHODS = {
    "chain": {},
    "greedy chain": {"draft_sample_method": "greedy"},
    "tree": {"tree_budget": 6},
    "auto": {"tree_budget": "auto"},
}


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS.keys())
def test_the_distribution_is_the_targets(model, exact, options: dict[str, Any]) -> None:
    found, acceptance_length = sample(model, options)
    assert acceptance_length > 1.05, "too few accepted drafts for the test to mean anything"
    assert p_value(found, exact) > ALPHA


@pytest.mark.parametrize("tempering", [{"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.6}], ids=str)
def test_tempered_distributions_too(model, tempering: dict[str, Any]) -> None:
    warped = exact_probabilities(model, tempering)
    found, _ = sample(model, tempering)
    assert all(warped[c] > 0.0 for c in found)
    assert p_value(found, warped) > ALPHA


@pytest.mark.parametrize("method", ["greedy chain", "tree"])
def test_a_planted_bias_is_noticed(model, exact, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk that takes the drafter's word for the target's in one of ten rounds."""
    real = round_.walk

    def credulous(tree, ancestors, target_ids, num_depths):
        believes = torch.rand(len(target_ids), generator=generator) < 0.1
        target_ids[:, 0] = torch.where(believes, tree.token_ids[:, 0], target_ids[:, 0])
        return real(tree, ancestors, target_ids, num_depths)

    generator = torch.Generator().manual_seed(1)
    monkeypatch.setattr(round_, "walk", credulous)
    assert p_value(sample(model, METHODS[method])[0], exact) < ALPHA


def test_a_bias_in_rejection_is_noticed(model, exact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts believed to be a fifth less likely than they are, so that too many are kept."""
    real = round_.reject

    def credulous(token_ids, draft_probs, logits, sampling):
        return real(token_ids, 0.8 * draft_probs, logits, sampling)

    monkeypatch.setattr(round_, "reject", credulous)
    assert p_value(sample(model, {})[0], exact) < ALPHA


def test_samples_are_kept_more_often_than_likeliest_tokens(model) -> None:
    assert sample(model, METHODS["chain"])[1] > sample(model, METHODS["greedy chain"])[1] + 0.05
