# SPDX-License-Identifier: Apache-2.0
"""The columns of the table, for the terminal and the page: a title, what it means, and a summary's value as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vllm_dflash.benchmark.measures import Spread, Summary

NONE = "–"


@dataclass(frozen=True)
class Column:
    title: str
    meaning: str
    value: Callable[[Summary], str]
    numeric: bool = True


def number(value: float | None, digits: int = 1, suffix: str = "") -> str:
    return NONE if value is None else f"{value:,.{digits}f}{suffix}"


def milliseconds(value: Spread | None) -> str:
    """p50 / p99 of seconds; two digits behind the point where there would be only one before it."""
    if value is None:
        return NONE
    p50, p99 = value.p50 * 1e3, value.p99 * 1e3
    digits = 2 if p50 < 10 else 1 if p50 < 100 else 0
    return f"{p50:,.{digits}f} / {p99:,.{digits}f}"


def share(value: float | None) -> str:
    return NONE if value is None else f"{value:.1%}"


def errors(summary: Summary) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(summary.errors.items())) or "0"


COLUMNS = (
    Column("prompts", "prompt set", lambda s: s.dataset, numeric=False),
    Column("at once", "requests in flight", lambda s: str(s.concurrency)),
    Column("system", "what was measured", lambda s: s.system, numeric=False),
    Column("tokens/s", "output tokens of completed requests / seconds", lambda s: number(s.tokens_per_second)),
    Column("speed-up", "tokens/s / the baseline's", lambda s: number(s.speedup, 2, "x")),
    Column("TTFT ms", "time to first token, p50 / p99", lambda s: milliseconds(s.ttft)),
    Column("TPOT ms", "time per output token, p50 / p99", lambda s: milliseconds(s.tpot)),
    Column("AL pooled", "acceptance length: 1 + accepted / drafts", lambda s: number(s.acceptance_length_pooled, 2)),
    Column(
        "AL mean",
        "acceptance length, mean of the responses' own",
        lambda s: number(s.acceptance_length_of_responses, 2),
    ),
    Column("accepted", "acceptance rate: accepted / drafted tokens", lambda s: share(s.acceptance_rate)),
    Column("requests", "requests sent, failed ones included", lambda s: str(s.requests)),
    Column("errors", "requests that failed, by kind", errors, numeric=False),
    Column("prefix hits", "prompt tokens from the prefix cache", lambda s: share(s.prefix_cache_hit_rate)),
    Column("preempted", "requests preempted", lambda s: NONE if s.preemptions is None else str(s.preemptions)),
)
