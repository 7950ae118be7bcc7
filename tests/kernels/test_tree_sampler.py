# SPDX-License-Identifier: Apache-2.0
"""The walk's tokens are samples of the target: a chi-square test against exact probabilities, false-alarm rate ALPHA.
A planted bias shows its power."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch
from scipy.stats import chisquare

from vllm_dflash.compat.ownership import TreeShape
from vllm_dflash.compat.trees.sampler import TreeSampler
from vllm_dflash.compat.trees.store import TreeStore
from vllm_dflash.tree import ROOT

ALPHA = 1e-4
NUM_REQUESTS, VOCAB = 300, 4
#: After token 0, the root's: 1, 2, and after that 2: 0, 3.
TOKENS, PARENTS, DEPTHS = [1, 2, 0, 3], [ROOT, ROOT, 1, 1], [1, 1, 2, 2]


def bigram_logits() -> torch.Tensor:
    """A target that looks at one token, [V, V]."""
    return 1.5 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(4))


def sampled_texts(device: str, planted_bias: float = 0.0) -> list[list[int]]:
    """What each request gains in one step, at temperature 1."""
    shape = TreeShape(num_nodes=4, num_depths=2, num_choices=4)
    trees = TreeStore(NUM_REQUESTS, 5 * NUM_REQUESTS, shape, torch.device(device))
    trees.trees.parents[:] = torch.tensor(PARENTS, device=device)
    trees.trees.depths[:] = torch.tensor(DEPTHS, device=device)
    trees.trees.is_node.fill_(True)
    everyone = torch.arange(NUM_REQUESTS, device=device)
    row_tokens = torch.tensor([0, *TOKENS] * NUM_REQUESTS, device=device)
    logits = bigram_logits().to(device)[row_tokens]
    logits.view(NUM_REQUESTS, 5, VOCAB)[:, 0, [1, 2]] += planted_bias
    sampler = TreeSampler.__new__(TreeSampler)
    sampler.trees = trees
    states = SimpleNamespace(
        temperature=SimpleNamespace(gpu=torch.ones(NUM_REQUESTS, device=device)),
        seeds=SimpleNamespace(gpu=torch.arange(NUM_REQUESTS, device=device) * 7919 + 11),
    )
    sampler.sampler = SimpleNamespace(
        apply_sampling_params=lambda given, *_: given, sampling_states=states, use_fp64_gumbel=False
    )
    local_rows = torch.arange(5, device=device).repeat(NUM_REQUESTS)
    _, sampled, num_sampled = sampler._verify(
        logits,
        None,
        row_tokens,
        100 + local_rows,
        torch.arange(NUM_REQUESTS + 1, device=device) * 5,
        everyone,
        np.arange(NUM_REQUESTS),
        everyone.repeat_interleave(5),
        local_rows,
        np.full(NUM_REQUESTS, 200),
        row_tokens,
    )
    return [row[:count] for row, count in zip(sampled.tolist(), num_sampled.tolist(), strict=True)]


def p_value(texts: list[list[int]]) -> float:
    """Of the first token, and of the second where the first was a candidate."""
    probs = bigram_logits().double().softmax(dim=-1).tolist()
    expected = {(first,): probs[0][first] for first in (0, 3)}
    expected |= {(first, second): probs[0][first] * probs[first][second] for first in (1, 2) for second in range(VOCAB)}
    seen = Counter(tuple(text[:2]) for text in texts)
    assert set(seen) <= set(expected)
    return float(chisquare([seen[text] for text in expected], [NUM_REQUESTS * p for p in expected.values()]).pvalue)


def test_the_texts_are_samples_of_the_target(device: str) -> None:
    texts = sampled_texts(device)
    assert p_value(texts) > ALPHA
    assert max(map(len, texts)) == 3, "no way down to the second depth"


def test_a_planted_bias_is_noticed(device: str) -> None:
    assert p_value(sampled_texts(device, planted_bias=1.2)) < ALPHA
