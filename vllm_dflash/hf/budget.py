# SPDX-License-Identifier: Apache-2.0
"""How many nodes are worth verifying: `tree_budget="auto"`.

A tree of N nodes is expected to add 1 + (sum of its nodes' probabilities) tokens, if the probabilities are calibrated,
and since nodes come likeliest first, the first N of a larger tree are the tree of N. A round of N nodes takes so long
as it took before. The best N yields most tokens a second: the rule of CaDDTree, arXiv 2606.01813, with measured times
instead of modelled ones.

Letters: B sequences, N nodes.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

import torch

#: What is chosen from. The first is about a short chain.
BUDGETS = (3, 7, 15, 31, 63, 127)
TRIALS = 3  # rounds of every budget before there is a choice; the first of them is not timed
REMEMBERED = 9  # rounds; the median of their times counts


class RoundCosts:
    """Seconds a round takes by its number of nodes, for one target and number of sequences."""

    def __init__(self, budgets: Sequence[int] = BUDGETS) -> None:
        self.budgets = tuple(budgets)
        self.num_rounds = dict.fromkeys(self.budgets, 0)
        self.seconds: dict[int, deque[float]] = {budget: deque(maxlen=REMEMBERED) for budget in self.budgets}

    def record(self, budget: int, seconds: float) -> None:
        """What a round took. The first of a budget does not count: memory is taken then, kernels are loaded."""
        self.num_rounds[budget] += 1
        if self.num_rounds[budget] > 1:
            self.seconds[budget].append(seconds)

    def untried(self) -> int | None:
        """A budget that still needs trials."""
        return next((budget for budget in self.budgets if self.num_rounds[budget] < TRIALS), None)

    def worth_drafting(self, last: int | None) -> int:
        """Nodes to draft if `last` were verified in the round before: those of the next larger budget.

        A larger one would not be chosen all at once, and sorting its nodes costs time too.
        """
        untried = self.untried()
        if untried is not None or last is None:
            return untried or self.budgets[-1]
        return next((budget for budget in self.budgets if budget > last), last)

    def choose(self, expected: Sequence[float], most: int) -> int:
        """The budget of most expected tokens a second, of those up to `most`; one that needs trials comes first.

        `expected` is the sum of the nodes' probabilities for each of the budgets.
        """
        untried = self.untried()
        if untried is not None:
            return untried
        rates = [
            (1.0 + more) / statistics.median(self.seconds[budget])
            for budget, more in zip(self.budgets, expected, strict=True)
            if budget <= most
        ]
        return self.budgets[rates.index(max(rates))]


def expected_acceptance(
    log_probs: torch.Tensor,  # [B, N] of nodes, likeliest first; N: the largest budget or all there are
    active: torch.Tensor,  # [B] bool
    budgets: Sequence[int] = BUDGETS,
) -> torch.Tensor:
    """Tokens that trees of these sizes are expected to add, without the bonus token: mean of active rows, [budgets]."""
    sums = log_probs.exp().cumsum(dim=1)
    of_budgets = torch.stack([sums[:, min(budget, sums.shape[1]) - 1] for budget in budgets], dim=1)  # [B, budgets]
    weights = active.float() / active.sum().clamp(min=1)
    return (of_budgets * weights[:, None]).sum(dim=0)
