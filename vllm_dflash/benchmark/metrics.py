# SPDX-License-Identifier: Apache-2.0
"""What the numbers of a speculative run mean. Pure arithmetic.

draft               one pass of the drafter for one request, verified by one target step
acceptance length   1 + accepted / drafts: tokens that a verification step yields on average, the bonus token included
acceptance rate     accepted / drafted: the share of proposed tokens that the target took
position rate       drafts whose token at that position was accepted / drafts, counted from position 0. Falls from left
                    to right, as a token counts only if all before it were accepted. Only meaningful where every draft
                    has the same length: a shorter draft counts as a rejection of the positions it lacks.
tokens per second   output tokens / wall seconds of the generating calls, prefill included

All of them are pooled: sums over all requests divided by sums over all requests, so long responses weigh more. The last
draft of a response may have more tokens accepted than the response had room for; they count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class AcceptanceCounts:
    """vLLM's speculation counters, either since the engine's start or, subtracted, over a stretch of work."""

    drafts: int
    drafted_tokens: int
    accepted_tokens: int
    accepted_per_position: tuple[int, ...]

    def __sub__(self, earlier: AcceptanceCounts) -> AcceptanceCounts:
        return AcceptanceCounts(
            drafts=self.drafts - earlier.drafts,
            drafted_tokens=self.drafted_tokens - earlier.drafted_tokens,
            accepted_tokens=self.accepted_tokens - earlier.accepted_tokens,
            accepted_per_position=tuple(
                now - then for now, then in zip(self.accepted_per_position, earlier.accepted_per_position, strict=True)
            ),
        )

    @property
    def acceptance_length(self) -> float | None:
        """1 + accepted / drafts; None if nothing was drafted."""
        return 1 + self.accepted_tokens / self.drafts if self.drafts else None

    @property
    def acceptance_rate(self) -> float | None:
        """accepted / drafted; None if nothing was drafted."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None

    @property
    def position_rates(self) -> tuple[float, ...]:
        """Share of drafts accepted up to and including each position; empty if nothing was drafted."""
        return tuple(count / self.drafts for count in self.accepted_per_position) if self.drafts else ()


def tokens_per_second(num_tokens: int, seconds: float) -> float:
    """Output tokens per wall second; 0 where no time was measured."""
    return num_tokens / seconds if seconds > 0 else 0.0


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first token id that differs, or at which one sequence ends; None if they are identical."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))
