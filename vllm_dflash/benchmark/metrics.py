# SPDX-License-Identifier: Apache-2.0
"""What the numbers of a speculative run mean. Pure arithmetic.

draft               one pass of the drafter for one request, verified by one target step
acceptance length   1 + accepted / drafts: tokens that a verification step yields on average, the bonus token included
acceptance rate     accepted / drafted: the share of proposed tokens that the target took
position rate       drafts whose token at that position was accepted / drafts that had a token there, counted from
                    position 0. A token counts as accepted only if all before it were. Where the counters do not tell
                    how many drafts reached a position, all drafts are the divisor: then a shorter draft counts as a
                    rejection of the positions it lacks, and late positions read too low.
histogram           how many drafts had exactly 0, 1, 2, ... tokens accepted
tokens per second   output tokens / wall seconds of the generating calls, prefill included

All of them are pooled: sums over all requests divided by sums over all requests, so long responses weigh more. The last
draft of a response may have more tokens accepted than the response had room for; they count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import add, sub


@dataclass(frozen=True)
class AcceptanceCounts:
    """vLLM's speculation counters, either since the engine's start or, subtracted, over a stretch of work.

    drafted_per_position: drafts that had a token at each position; None where it was not counted.
    """

    drafts: int
    drafted_tokens: int
    accepted_tokens: int
    accepted_per_position: tuple[int, ...]
    drafted_per_position: tuple[int, ...] | None = None

    def __sub__(self, earlier: AcceptanceCounts) -> AcceptanceCounts:
        return self._combined(earlier, sub)

    def __add__(self, other: AcceptanceCounts) -> AcceptanceCounts:
        return self._combined(other, add)

    def _combined(self, other: AcceptanceCounts, operation: Callable[[int, int], int]) -> AcceptanceCounts:
        """Field by field; without the drafted tokens of each position if one side does not have them."""
        drafted = None
        if self.drafted_per_position is not None and other.drafted_per_position is not None:
            drafted = tuple(map(operation, *equally_long(self.drafted_per_position, other.drafted_per_position)))
        accepted = equally_long(self.accepted_per_position, other.accepted_per_position)
        return AcceptanceCounts(
            drafts=operation(self.drafts, other.drafts),
            drafted_tokens=operation(self.drafted_tokens, other.drafted_tokens),
            accepted_tokens=operation(self.accepted_tokens, other.accepted_tokens),
            accepted_per_position=tuple(map(operation, *accepted)),
            drafted_per_position=drafted,
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
        """Share accepted at each position, up to the last one that was ever drafted; empty if nothing was drafted."""
        drafted = self.drafted_per_position or (self.drafts,) * len(self.accepted_per_position)
        pairs = zip(self.accepted_per_position, drafted, strict=True)
        return tuple(accepted / count for accepted, count in pairs if count)

    @property
    def histogram(self) -> tuple[int, ...]:
        """Drafts with exactly 0, 1, ... accepted tokens. Right for drafts of any lengths: each token's acceptance
        implies that of all before it, so position i counts the drafts with more than i accepted tokens.
        """
        if not self.drafts:
            return ()
        at_least = (self.drafts, *self.accepted_per_position, 0)
        return tuple(more - fewer for more, fewer in zip(at_least, at_least[1:], strict=False))


def counts_of_rounds(lengths: Sequence[int], num_speculative_tokens: int) -> AcceptanceCounts:
    """Of the tokens that each round gave, bonus token included, where every round drafts a whole block."""
    drafts, positions = len(lengths), range(1, num_speculative_tokens + 1)
    return AcceptanceCounts(
        drafts=drafts,
        drafted_tokens=drafts * num_speculative_tokens,
        accepted_tokens=sum(lengths) - drafts,
        accepted_per_position=tuple(sum(length > position for length in lengths) for position in positions),
        drafted_per_position=(drafts,) * num_speculative_tokens,
    )


def equally_long(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Both, if they are. Raises ValueError if counts are of different draft lengths."""
    if len(left) != len(right):
        raise ValueError(f"counts of {len(left)} and of {len(right)} draft positions do not go together")
    return left, right


def tokens_per_second(num_tokens: int, seconds: float) -> float:
    """Output tokens per wall second; 0 where no time was measured."""
    return num_tokens / seconds if seconds > 0 else 0.0


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first token id that differs, or at which one sequence ends; None if they are identical."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))
