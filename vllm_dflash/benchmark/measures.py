# SPDX-License-Identifier: Apache-2.0
"""What a run's records amount to. Pure arithmetic; `metrics` defines the words of acceptance.

TTFT                 time to first token: from the request sent to the first chunk that carries a token
TPOT                 time per output token: (last token - first token) / (output tokens - 1), of one request. A chunk of
                     speculative decoding carries several tokens, so chunks are not counted
output tokens/s      output tokens of all completed requests / seconds of the run, prefill and queues included
speed-up             output tokens/s / that of the baseline on the same prompts at the same concurrency
acceptance length, pooled
                     1 + accepted / drafts over all requests: long responses weigh more
acceptance length, mean of responses
                     every response's own acceptance length, averaged: all responses weigh the same
percentiles          linear between the two nearest ranks

Requests that failed count as errors; times and tokens are of the others. What a server did for a request before it
failed is in the server's counters: figures of acceptance, prefix hits and preemptions that come from these hold it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_dflash.benchmark.metrics import AcceptanceCounts, tokens_per_second
from vllm_dflash.benchmark.records import RequestRecord, ResponseAcceptance, Run

DRAFTED, DRAFTS = "drafts that reached the position", "all drafts"


@dataclass(frozen=True)
class Spread:
    """Of some seconds, one value a request: mean, median and 99th percentile."""

    mean: float
    p50: float
    p99: float


@dataclass(frozen=True)
class Summary:
    """One run's measures. None: the backend does not tell, or nothing was there to measure.

    pooled_from: where the pooled acceptance length comes from, "counters" of the server or "responses".
    position_divisor: what position_rates divide by, DRAFTED or DRAFTS.
    """

    system: str
    dataset: str
    concurrency: int
    requests: int
    errors: dict[str, int]
    output_tokens: int
    tokens_per_second: float | None
    ttft: Spread | None
    tpot: Spread | None
    acceptance_length_pooled: float | None
    pooled_from: str | None
    acceptance_length_of_responses: float | None
    acceptance_rate: float | None
    position_rates: tuple[float, ...]
    position_divisor: str | None
    accepted_histogram: tuple[int, ...]
    preemptions: int | None
    prefix_cache_hit_rate: float | None
    speedup: float | None = None


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks. Raises ValueError for no values."""
    if not values:
        raise ValueError("no percentile of nothing")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def spread(values: Iterable[float | None]) -> Spread | None:
    """None if there is no value."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(math.fsum(known) / len(known), percentile(known, 50), percentile(known, 99))


def time_to_first_token(record: RequestRecord) -> float | None:
    """Seconds; None if no token came."""
    return None if record.first_token is None else record.first_token - record.sent


def time_per_output_token(record: RequestRecord) -> float | None:
    """Seconds; None for fewer than two tokens."""
    if record.first_token is None or record.last_token is None or record.output_tokens < 2:
        return None
    return (record.last_token - record.first_token) / (record.output_tokens - 1)


def summarise(run: Run, reference_speed: float | None = None) -> Summary:
    """A run's measures. reference_speed: tokens/s of the same prompts on the system that its speed-up is over."""
    done = [record for record in run.requests if record.error is None]
    output_tokens = sum(record.output_tokens for record in done)
    counters = run.counters
    counts = counters.acceptance if counters else None
    speed = tokens_per_second(output_tokens, run.seconds) if done else None
    responses = [record.acceptance for record in done if record.acceptance is not None]
    pooled, pooled_from = _pooled_length(counts, responses, len(done))
    hits = queries = None
    if counters:
        hits, queries = counters.prefix_cache_hits, counters.prefix_cache_queries
    return Summary(
        system=run.system,
        dataset=run.dataset,
        concurrency=run.concurrency,
        requests=len(run.requests),
        errors=dict(Counter(record.error.kind for record in run.requests if record.error)),
        output_tokens=output_tokens,
        tokens_per_second=speed,
        ttft=spread(time_to_first_token(record) for record in done),
        tpot=spread(time_per_output_token(record) for record in done),
        acceptance_length_pooled=pooled,
        pooled_from=pooled_from,
        acceptance_length_of_responses=_mean([response.mean_length for response in responses]),
        acceptance_rate=_acceptance_rate(counts, responses),
        position_rates=counts.position_rates if counts else (),
        position_divisor=None if not counts else DRAFTED if counts.drafted_per_position else DRAFTS,
        accepted_histogram=counts.histogram if counts else (),
        preemptions=counters.preemptions if counters else None,
        prefix_cache_hit_rate=hits / queries if hits is not None and queries else None,
        speedup=speed / reference_speed if speed is not None and reference_speed else None,
    )


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _pooled_length(
    counts: AcceptanceCounts | None, responses: Sequence[ResponseAcceptance], completed: int
) -> tuple[float | None, str | None]:
    """From the counters, or from the responses if every one of them tells its counts."""
    if counts is not None and counts.acceptance_length is not None:
        return counts.acceptance_length, "counters"
    drafts = [response.drafts for response in responses if response.drafts is not None]
    accepted = [response.accepted for response in responses if response.accepted is not None]
    if completed and len(drafts) == len(accepted) == completed and sum(drafts):
        return 1 + sum(accepted) / sum(drafts), "responses"
    return None, None


def _acceptance_rate(counts: AcceptanceCounts | None, responses: Sequence[ResponseAcceptance]) -> float | None:
    if counts is not None:
        return counts.acceptance_rate
    told = [response for response in responses if response.drafted and response.accepted is not None]
    if not told or len(told) != len(responses):
        return None
    return sum(response.accepted or 0 for response in told) / sum(response.drafted or 0 for response in told)
