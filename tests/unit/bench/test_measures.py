# SPDX-License-Identifier: Apache-2.0
"""Every measure of a run, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from vllm_dflash.benchmark.measures import (
    DRAFTED,
    DRAFTS,
    Spread,
    percentile,
    spread,
    summarise,
    time_per_output_token,
    time_to_first_token,
)
from vllm_dflash.benchmark.metrics import AcceptanceCounts
from vllm_dflash.benchmark.records import Counters, RequestError, RequestRecord, ResponseAcceptance, Run


def record(**changes: object) -> RequestRecord:
    """Sent at 1 s; tokens from 1.5 s to 3.5 s, 9 of them."""
    fields: dict[str, object] = {"name": "p", "turn": 1, "sent": 1.0, "ended": 3.6, "first_token": 1.5}
    fields |= {"last_token": 3.5, "prompt_tokens": 7, "output_tokens": 9} | changes
    return RequestRecord(**fields)  # type: ignore[arg-type]


def run(*requests: RequestRecord, seconds: float = 4.0, counters: Counters | None = None) -> Run:
    return Run("dflash", "mini", 2, seconds, requests, counters)


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([3.0], 99, 3.0),
        ([1.0, 2.0], 50, 1.5),
        ([4.0, 1.0, 3.0, 2.0], 50, 2.5),
        ([10.0, 20.0, 30.0, 40.0, 50.0], 99, 49.6),  # rank 3.96: 40 + 0.96 * 10
        ([10.0, 20.0, 30.0], 0, 10.0),
        ([10.0, 20.0, 30.0], 100, 30.0),
    ],
)
def test_percentile_is_linear_between_ranks(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_no_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 50)
    assert spread([None, None]) is None


def test_spread_leaves_out_what_is_not_known() -> None:
    found = spread([1.0, None, 3.0, 8.0])
    assert found is not None
    assert (found.mean, found.p50) == (4.0, 3.0)
    assert found.p99 == pytest.approx(7.9)  # rank 1.98: 3 + 0.98 * 5


def test_time_to_first_token_starts_when_the_request_is_sent() -> None:
    assert time_to_first_token(record()) == 0.5
    assert time_to_first_token(record(first_token=None)) is None


def test_time_per_output_token_counts_tokens_and_not_chunks() -> None:
    # Nine tokens that came in, say, three chunks: 2 s / 8, not 2 s / 2.
    assert time_per_output_token(record()) == 0.25


def test_one_token_has_no_time_per_output_token() -> None:
    assert time_per_output_token(record(output_tokens=1, last_token=1.5)) is None


def test_a_run_counts_completed_requests_alone() -> None:
    failed = record(output_tokens=5, error=RequestError("timeout", "1 s"))
    summary = summarise(run(record(), record(output_tokens=3), failed, failed, record(error=RequestError("x", ""))))
    assert (summary.requests, summary.errors) == (5, {"timeout": 2, "x": 1})
    assert (summary.output_tokens, summary.tokens_per_second) == (12, 3.0)
    assert summary.ttft == Spread(0.5, 0.5, 0.5)
    assert summary.tpot is not None
    assert summary.tpot.mean == 0.625  # (0.25 + 1.0) / 2


def test_nothing_completed_is_not_zero_tokens_a_second() -> None:
    summary = summarise(run(record(error=RequestError("timeout", ""))))
    assert (summary.tokens_per_second, summary.ttft, summary.tpot) == (None, None, None)


def test_pooled_and_mean_acceptance_lengths_differ() -> None:
    """A long response with 30 accepted in 10 drafts, a short one with none in 2."""
    long = record(acceptance=ResponseAcceptance(4.0, drafts=10, accepted=30, drafted=150))
    short = record(acceptance=ResponseAcceptance(1.0, drafts=2, accepted=0, drafted=30))
    summary = summarise(run(long, short))
    assert summary.acceptance_length_pooled == 3.5  # 1 + 30 / 12
    assert summary.acceptance_length_of_responses == 2.5
    assert summary.pooled_from == "responses"
    assert summary.acceptance_rate == pytest.approx(30 / 180)


def test_responses_that_do_not_tell_are_not_pooled() -> None:
    told = record(acceptance=ResponseAcceptance(4.0, drafts=10, accepted=30, drafted=150))
    summary = summarise(run(told, record()))
    assert (summary.acceptance_length_pooled, summary.pooled_from) == (None, None)
    assert summary.acceptance_length_of_responses == 4.0


def test_counters_come_before_responses() -> None:
    counts = AcceptanceCounts(drafts=4, drafted_tokens=12, accepted_tokens=5, accepted_per_position=(3, 1, 1))
    told = record(acceptance=ResponseAcceptance(9.0, drafts=1, accepted=8, drafted=15))
    summary = summarise(run(told, counters=Counters(counts, 9, 2, 200, 50)))
    assert (summary.acceptance_length_pooled, summary.pooled_from) == (2.25, "counters")
    assert summary.acceptance_rate == pytest.approx(5 / 12)
    assert (summary.position_rates, summary.position_divisor) == ((0.75, 0.25, 0.25), DRAFTS)
    assert summary.accepted_histogram == (1, 2, 0, 1)
    assert (summary.preemptions, summary.prefix_cache_hit_rate) == (2, 0.25)


def test_positions_divide_by_the_drafts_that_reach_them_where_these_are_counted() -> None:
    counts = AcceptanceCounts(4, 8, 4, (2, 1, 1), (4, 2, 2))
    summary = summarise(run(record(), counters=Counters(counts)))
    assert (summary.position_rates, summary.position_divisor) == ((0.5, 0.5, 0.5), DRAFTED)


def test_speedup_is_the_ratio_of_tokens_a_second() -> None:
    assert summarise(run(record(), seconds=3.0), 2.0).speedup == 1.5  # 9 tokens in 3 s
    assert summarise(run(record(error=RequestError("timeout", ""))), 2.0).speedup is None
    assert summarise(run(record())).speedup is None


def test_counters_over_a_run_are_a_difference() -> None:
    before = Counters(AcceptanceCounts(1, 3, 1, (1, 0, 0)), 10, 0, 5, 0)
    after = Counters(AcceptanceCounts(3, 9, 5, (3, 1, 1)), 40, 2, 25, 10)
    assert after - before == Counters(AcceptanceCounts(2, 6, 4, (2, 1, 1)), 30, 2, 20, 10)
    assert Counters(after.acceptance, 40) - Counters() == Counters(after.acceptance, 40)


def test_counters_that_fell_are_another_servers() -> None:
    before = Counters(AcceptanceCounts(1, 3, 1, (1, 0, 0)), 10, 0, 5, 0)
    after = Counters(AcceptanceCounts(3, 9, 5, (3, 1, 1), (3, 3, 3)), 40, 2, 25, 10)
    assert not after.fell_since(before) and not before.fell_since(before) and not after.fell_since(Counters())
    assert before.fell_since(after)
    assert Counters(after.acceptance, 40, 2, 4, 10).fell_since(before)  # 4 queries after 5
    assert Counters(AcceptanceCounts(3, 9, 5, (0, 1, 1)), 40, 2, 25, 10).fell_since(before)  # by position
    assert Counters(AcceptanceCounts(3, 9, 5, (3, 1)), 40, 2, 25, 10).fell_since(before)  # another K
    assert Counters(None, 40, 2, 25, 10).fell_since(before)
