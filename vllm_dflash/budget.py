# SPDX-License-Identifier: Apache-2.0
"""How many drafted nodes are worth verifying, for a whole batch. Torch-free.

A node of likelihood p is expected to add p tokens, so the B likeliest nodes of all requests add the sum of theirs. What
a step takes depends on its rows. The best B yields most expected tokens a second: the rule of CaDDTree
(arXiv 2606.01813), for batches, with measured times instead of modelled ones. Where even that yields less than a step
without drafts and without drafting, and has done so on average, nothing is drafted for a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

#: The weight of the last trees in the running average that drafting is judged by; of the first ones it is the mean.
_NEWS = 1 / 16
#: The device's part of a step that the host's hides surely.
_HIDDEN = 0.9


@dataclass(frozen=True)
class StepCosts:
    """Milliseconds of a step's parts, measured at start-up, but for the pairs, which are seen while serving.

    Pairs are without drafting and with it.
    """

    verify_ms: np.ndarray  # [rows + 1]: the target's forward and logits, of so many rows that are no candidates
    draft_ms: np.ndarray  # [requests + 1]: drafting for so many requests
    context_ms: float = 0.0  # reading a slot of context, behind the first ones of each request
    attention_ms: np.ndarray | None = None  # [requests + 1]: reading `profiled_context` slots of each of so many
    profiled_context: int = 0
    trees_ms: np.ndarray | None = None  # [requests + 1]: attention, where rows of so many requests may be candidates
    overheads_ms: tuple[float, float] = (0.0, 0.0)  # all else that a step's start and end are apart
    host_ms: tuple[float, float] = (0.0, 0.0)  # work of the host beside the device's: a step takes no less

    def with_overheads(self, overheads_ms: tuple[float, float], host_ms: tuple[float, float]) -> StepCosts:
        """The same beside other overheads."""
        return replace(self, overheads_ms=overheads_ms, host_ms=host_ms)

    def gpu_ms(self, rows: int, num_reqs: int, context: float, drafts: bool) -> float:
        """The measured parts of a step of so many rows."""
        trees_ms = self._trees_ms(num_reqs) if rows > num_reqs else 0.0
        return max(float(self.verify_ms[rows]) + trees_ms + self._other_ms(num_reqs, context, drafts), 1e-6)

    def step_ms(self, rows: int, num_reqs: int, context: float, drafts: bool) -> float:
        """The whole step."""
        return max(self.gpu_ms(rows, num_reqs, context, drafts) + self.overheads_ms[drafts], self.host_ms[drafts])

    def hidden_rows(self, num_reqs: int, context: float) -> int:
        """Up to how many rows are verified long before the host is ready for the next step; -1: not even none."""
        other_ms = self._trees_ms(num_reqs) + self._other_ms(num_reqs, context, drafts=True)
        gpu_ms = self.verify_ms + other_ms + self.overheads_ms[True]
        is_late = gpu_ms >= _HIDDEN * self.host_ms[True]
        return int(is_late.argmax() if is_late.any() else len(is_late)) - 1

    def steps_ms(
        self,
        first: int,
        last: int,
        num_reqs: int,
        context: float,
    ) -> np.ndarray:
        """[last - first + 1]: steps with drafting, of `first` rows that are no candidates, and up to `last` in all."""
        gpu_ms = self.verify_ms[first : last + 1] + self._other_ms(num_reqs, context, drafts=True)
        gpu_ms[1:] += self._trees_ms(num_reqs)
        return np.maximum(np.maximum(gpu_ms, 1e-6) + self.overheads_ms[True], self.host_ms[True])

    def _other_ms(self, num_reqs: int, context: float, drafts: bool) -> float:
        return self._context_ms(num_reqs, context) + (float(self.draft_ms[num_reqs]) if drafts else 0.0)

    def _context_ms(self, num_reqs: int, context: float) -> float:
        first_ms = 0.0 if self.attention_ms is None else float(self.attention_ms[num_reqs])
        return max(first_ms + self.context_ms * (context - num_reqs * self.profiled_context), 0.0)

    def _trees_ms(self, num_reqs: int) -> float:
        return 0.0 if self.trees_ms is None else float(self.trees_ms[num_reqs])

    def summary(self) -> str:
        """The table at some sizes, for a person."""
        num_rows, num_reqs = (1, 16, 64, 128, 256, 512, 1024), (1, 8, 32, 128, 512)
        rows = [size for size in num_rows if size < len(self.verify_ms)]
        requests = [size for size in num_reqs if size < len(self.draft_ms)]
        slots = self.profiled_context
        parts: dict[str, dict[int, float]] = {
            "a forward, ms by rows": {size: float(self.verify_ms[size]) for size in rows},
            "more for trees, ms by requests": {size: self._trees_ms(size) for size in requests},
            "drafting, ms by requests": {size: float(self.draft_ms[size]) for size in requests},
            f"reading {slots} slots each, ms by requests": {s: self._context_ms(s, s * slots) for s in requests},
        }
        listed = [f"{name}: " + ", ".join(f"{s} {ms:.2f}" for s, ms in part.items()) for name, part in parts.items()]
        return "; ".join([*listed, f"{1e6 * self.context_ms:.2f} ms for each million slots more"])


@dataclass(frozen=True)
class Choice:
    """What a batch verifies, and what that is expected to give."""

    budget: int  # nodes of all requests
    expected: float  # tokens
    step_ms: float
    gain: float  # tokens a request more than steps without drafting give in the same time
    plain_ms: float  # a step that neither verifies nor drafts

    @property
    def is_worth_drafting(self) -> bool:
        """Whether steps like this one are better than those without drafting."""
        return self.gain >= 0.0


class DraftingGain:
    """What drafting has gained since it began, a request and step. Of one tree little follows for the next one.

    Code is drafted well but for a name here and there: where the last tree says nothing, the next one may say much.
    """

    def __init__(self) -> None:
        self._mean, self._count = 0.0, 0

    def pays(self, last: Choice, is_new: bool) -> bool:
        """Whether to draft: on the running average, or because the last trees are better than that.

        `is_new`: they have not been asked about before.
        """
        if is_new:
            self._count += 1
            self._mean += max(_NEWS, 1 / self._count) * (last.gain - self._mean)
        pays = last.is_worth_drafting or (self._count > 0 and self._mean >= 0.0)
        if not pays:  # what was, under another load perhaps, does not count against the next attempt
            self._mean, self._count = 0.0, 0
        return pays


def choose(
    likelihoods: np.ndarray,  # [M] of all nodes there are, descending
    num_sampling: int,  # requests that gain a token whatever is accepted
    num_other_rows: int,  # rows that are no candidates
    num_reqs: int,
    context: float,  # slots of context that the batch reads
    costs: StepCosts,
) -> Choice:
    """The number of nodes of most expected tokens a second, and whether drafting is worth it at all."""
    most = min(len(likelihoods), max(0, len(costs.verify_ms) - 1 - num_other_rows))
    expected: np.ndarray = np.empty(most + 1)
    expected[0] = 0.0
    np.cumsum(likelihoods[:most], out=expected[1:])
    expected += num_sampling
    ms = costs.steps_ms(num_other_rows, num_other_rows + most, num_reqs, context)
    budget = int((expected / ms).argmax())
    tokens, step_ms = float(expected[budget]), float(ms[budget])
    plain_ms = costs.step_ms(num_other_rows, num_reqs, context, drafts=False)
    without = num_sampling * step_ms / plain_ms
    return Choice(budget, tokens, step_ms, (tokens - without) / max(1, num_sampling), plain_ms)


def even_shares(
    planned: Sequence[int],  # R: nodes of each request
    budget: int,  # at most their sum
) -> list[int]:
    """Nodes of each request whose sum is the budget, none more than was planned, where nobody knows whose they are.

    Example: of 4, 2 and 2 planned ones 4: 2, 1 and 1.
    """
    total, before, given, shares = max(1, sum(planned)), 0, 0, []
    for count in planned:
        before += count
        until = before * budget // total
        shares.append(until - given)
        given = until
    return shares


def stepped(
    samples: Sequence[tuple[int, float]],  # size and value, ascending
    most: int,
) -> np.ndarray:
    """A table [most + 1] of values at sizes that graphs are captured for: whatever is between is padded to the next.

    Behind the last size, the straight line through the last two.
    """
    sizes, values = (np.asarray(column, dtype=np.float64) for column in zip(*samples, strict=True))
    values = np.maximum.accumulate(values)
    wanted = np.arange(most + 1)
    table = values[np.minimum(np.searchsorted(sizes, wanted), len(sizes) - 1)]
    if len(sizes) > 1:
        behind = wanted > sizes[-1]
        slope = (values[-1] - values[-2]) / (sizes[-1] - sizes[-2])
        table[behind] = values[-1] + slope * (wanted[behind] - sizes[-1])
    return table
