# SPDX-License-Identifier: Apache-2.0
"""When a server's log is warned: drafting that cannot pay, and a prefix cache that finds nothing. Pure arithmetic.

Each looks at a stretch of work that is long enough to tell, says in one line what it saw and what to try, and then says
nothing for an hour.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from vllm_dflash.compat.metrics.report import StepReport

QUIET_SECONDS = 3600.0
#: A stretch of drafting: both at least.
MIN_DRAFTS, MIN_SECONDS = 2000, 60.0
#: Fewer accepted than one token in four drafts: whatever a step takes, something is wrong with the pair.
LEAST_LENGTH = 1.25

#: Prompts whose first blocks are looked for among later ones, and in how many of a prompt's blocks.
_REMEMBERED, _BLOCKS = 512, 2
#: A stretch of lookups: so many prompts that repeat an earlier one's first blocks.
MIN_REPEATS = 64
#: Fewer of the repeated prompts than this found anything, if the tokens found were one block each.
_LEAST_SHARE = 0.1


class _Quiet:
    """Lets one warning through, then none for an hour."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last: float | None = None

    def passes(self) -> bool:
        now = self._clock()
        if self._last is not None and now - self._last < QUIET_SECONDS:
            return False
        self._last = now
        return True


class AcceptanceWatch:
    """Compares the acceptance length of a stretch with what a step of its time would have to yield."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._quiet = clock, _Quiet(clock)
        self._break_even: float | None = None  # by a table of costs
        self._begin()

    def _begin(self) -> None:
        self._start = self._clock()
        self._drafts = self._accepted = 0
        self._verify_us = self._draft_us = 0

    def see(self, num_drafts: int, num_accepted: int, report: StepReport) -> str | None:
        """One step, with its drafts of which at least one token was verified. What is to be said now, if anything."""
        self._drafts += num_drafts
        self._accepted += num_accepted
        self._break_even = report.break_even or self._break_even
        if report.times is not None:
            self._verify_us += report.times.verify_us
            self._draft_us += report.times.draft_us
        seconds = self._clock() - self._start
        if self._drafts < MIN_DRAFTS or seconds < MIN_SECONDS:
            return None
        length, (needed, because) = 1 + self._accepted / self._drafts, self._needed()
        drafts = self._drafts
        self._begin()
        if length >= needed or not self._quiet.passes():
            return None
        return (
            f"acceptance length {length:.2f} over the last {drafts} drafts ({seconds:.0f} s) is below {needed:.2f}: "
            f"{because}. So speculation costs time here. Try: the chat template's thinking mode that the drafter was "
            "trained for; `vllm-dflash doctor` (is it this target's drafter, with the right layers?); fewer draft "
            "tokens (docs/metrics.md)"
        )

    def _needed(self) -> tuple[float, str]:
        """The acceptance length at which speculation begins to pay, and where it comes from."""
        found, because = LEAST_LENGTH, "no pair that fits accepts so little"
        if self._verify_us:
            # Verifying takes no less than a step without drafts would.
            ratio = 1 + self._draft_us / self._verify_us
            if ratio > found:
                found, because = ratio, f"drafting adds {100 * (ratio - 1):.0f} % to the time of a step"
        if self._break_even is not None and self._break_even > found:
            found, because = self._break_even, f"by measured costs a step takes {self._break_even:.2f} times as long"
        return found, because


class PrefixCacheWatch:
    """Compares what the prefix cache found with the prompts that began like an earlier one."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._quiet = _Quiet(clock)
        self._seen: OrderedDict[object, None] = OrderedDict()
        self._begin()

    def _begin(self) -> None:
        self._repeats = self._requests = self._queries = self._hits = 0

    def see_prompt(self, block_hashes: Sequence[object]) -> None:
        """A new request's prompt, by the hashes of its whole blocks. Each hash covers all blocks before it too."""
        if len(block_hashes) < _BLOCKS:
            return
        key = block_hashes[_BLOCKS - 1]
        self._repeats += key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)

    def see_lookups(self, num_requests: int, num_queries: int, num_hits: int) -> str | None:
        """Tokens that requests looked for and found. What is to be said now, if anything."""
        self._requests += num_requests
        self._queries += num_queries
        self._hits += num_hits
        if self._repeats < MIN_REPEATS:
            return None
        repeats, requests, queries, hits = self._repeats, self._requests, self._queries, self._hits
        self._begin()
        # A repeated prompt finds a block of tokens at least; no block is smaller than one token.
        if hits >= _LEAST_SHARE * repeats or not self._quiet.passes():
            return None
        return (
            f"the prefix cache found {hits} of the {queries} tokens of the last {requests} prompts, although {repeats} "
            "of them began like an earlier one. A drafter can do that where its layers and the target's are cached in "
            "groups of their own. Try: the same prompts without --speculative-config, to see whether it is the drafter;"
            " a larger --gpu-memory-utilization; with a target that mixes kinds of layers, "
            "--disable-hybrid-kv-cache-manager (docs/metrics.md)"
        )
