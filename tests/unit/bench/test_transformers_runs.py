# SPDX-License-Identifier: Apache-2.0
"""Counts and times of runs on Transformers, by hand; the runs themselves are tested beside vLLM's in tests/e2e."""

from __future__ import annotations

from vllm_dflash.benchmark.metrics import AcceptanceCounts
from vllm_dflash.benchmark.transformers_runs import Clock, acceptance_counts


def test_rounds_become_counters() -> None:
    """Four rounds of K = 3 that gave 4, 1, 2 and 1 tokens, the bonus token included: 3, 0, 1 and 0 accepted."""
    assert acceptance_counts([4, 1, 2, 1], 3) == AcceptanceCounts(4, 12, 4, (2, 1, 1), (4, 4, 4))


def test_the_prompt_is_no_token() -> None:
    clock = Clock()
    clock.put("prompt")
    assert clock.first_token is None
    clock.put("first")
    first = clock.first_token
    assert first is not None and clock.last_token == first
    clock.put("second")
    assert clock.first_token == first
    assert clock.last_token is not None and clock.last_token >= first
