# SPDX-License-Identifier: Apache-2.0
"""What a benchmark observes: one record a request, one run a system, prompt set and concurrency. Plain data only."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from vllm_dflash.benchmark.metrics import AcceptanceCounts


@dataclass(frozen=True)
class RequestError:
    """Why a request gave no measure. kind: one word, to count by; detail: for people."""

    kind: str
    detail: str


@dataclass(frozen=True)
class ResponseAcceptance:
    """One response's own speculation figures, as its backend reports them.

    mean_length: tokens a verification step, bonus token included.
    drafts, accepted, drafted: counts behind it, where they are told.
    """

    mean_length: float
    drafts: int | None = None
    accepted: int | None = None
    drafted: int | None = None


@dataclass(frozen=True)
class RequestRecord:
    """One request: a turn of a conversation. Times are seconds since the run's start.

    first_token, last_token: when the first and the last chunk with tokens came; None if none came.
    output_tokens: as the backend counts them, never the number of chunks.
    """

    name: str
    turn: int
    sent: float
    ended: float
    first_token: float | None = None
    last_token: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int = 0
    acceptance: ResponseAcceptance | None = None
    error: RequestError | None = None


@dataclass(frozen=True)
class Counters:
    """An engine's own counters, since its start or, subtracted, over a run. None where it does not have one."""

    acceptance: AcceptanceCounts | None = None
    output_tokens: int | None = None
    preemptions: int | None = None
    prefix_cache_queries: int | None = None
    prefix_cache_hits: int | None = None

    def __sub__(self, earlier: Counters) -> Counters:
        acceptance = self.acceptance
        if acceptance is not None and earlier.acceptance is not None:
            acceptance = acceptance - earlier.acceptance
        return Counters(
            acceptance,
            _difference(self.output_tokens, earlier.output_tokens),
            _difference(self.preemptions, earlier.preemptions),
            _difference(self.prefix_cache_queries, earlier.prefix_cache_queries),
            _difference(self.prefix_cache_hits, earlier.prefix_cache_hits),
        )

    def fell_since(self, earlier: Counters) -> bool:
        """Whether a count is lower than it was, is gone, or is of other draft positions: one server's only grow."""
        mine, theirs = self.acceptance, earlier.acceptance
        if mine and theirs and len(mine.accepted_per_position) != len(theirs.accepted_per_position):
            return True
        now = self._by_name()
        return any(now.get(name, 0) < count for name, count in earlier._by_name().items())

    def _by_name(self) -> dict[str, int]:
        """Every count that there is; those by position are named by it."""
        found: dict[str, int] = {}
        fields = asdict(self)
        by_acceptance = fields.pop("acceptance") or {}
        for name, value in (fields | by_acceptance).items():
            values = value if isinstance(value, tuple) else (value,)
            found |= {f"{name} {i}": count for i, count in enumerate(values) if count is not None}
        return found


def _difference(now: int | None, then: int | None) -> int | None:
    return None if now is None else now - (then or 0)


@dataclass(frozen=True)
class Run:
    """All requests of one prompt set, sent to one system at one concurrency.

    seconds: from the first request sent to the last one ended.
    counters: over this run alone, warm-up left out; None if the system has none to read.
    notes: what a reader of the numbers must know.
    reference_tokens_per_second: what its speed-up is over, where results of several files stand side by side.
    """

    system: str
    dataset: str
    concurrency: int
    seconds: float
    requests: tuple[RequestRecord, ...]
    counters: Counters | None = None
    notes: tuple[str, ...] = ()
    interrupted: bool = False
    reference_tokens_per_second: float | None = None
