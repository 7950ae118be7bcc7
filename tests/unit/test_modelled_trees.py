# SPDX-License-Identifier: Apache-2.0
"""What is modelled of trees whose budget follows the load: one request, steps of 1 ms for any rows, and drafting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vllm_dflash.budget import StepCosts

#: Of two nodes 1.1 tokens are expected, and one comes.
RECORD = {"likelihoods": [0.9, 0.2], "accepted": [0]}


@pytest.mark.parametrize(
    ("draft_ms", "tokens_s", "nodes"),
    [
        (0.5, 2 / 1.5 * 1000, 2.0),  # 2.1 expected in 1.5 ms instead of 1 in 1; the two that come are counted
        (1.5, 1000.0, 0.0),  # 2.1 in 2.5 ms: nothing is drafted, and steps take what they take without
    ],
)
def test_drafts_where_they_pay(monkeypatch: pytest.MonkeyPatch, draft_ms: float, tokens_s: float, nodes: float) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from modelled_trees import follow_the_load

    costs = StepCosts(np.ones(9), np.full(2, draft_ms), 0.0, np.zeros(9))
    found = follow_the_load(1, 0.0, [RECORD], costs)
    assert found == {"auto": pytest.approx(tokens_s), "auto's nodes a request": nodes}
