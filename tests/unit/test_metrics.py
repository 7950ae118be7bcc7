# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of acceptance and speed, against numbers worked out by hand."""

import pytest

from vllm_dflash.benchmark.metrics import AcceptanceCounts, counts_of_rounds, first_difference, tokens_per_second

NOTHING = AcceptanceCounts(drafts=0, drafted_tokens=0, accepted_tokens=0, accepted_per_position=(0, 0, 0))
# Four drafts of three tokens, with 3, 1, 1 and 0 of them accepted.
COUNTS = AcceptanceCounts(drafts=4, drafted_tokens=12, accepted_tokens=5, accepted_per_position=(3, 1, 1))


def test_rounds_of_whole_blocks_are_counted() -> None:
    # Four rounds of K = 3 that gave 4, 1, 2 and 1 tokens, the bonus token included: 3, 0, 1 and 0 accepted.
    assert counts_of_rounds([4, 1, 2, 1], 3) == AcceptanceCounts(4, 12, 4, (2, 1, 1), (4, 4, 4))
    assert counts_of_rounds([], 2) == AcceptanceCounts(0, 0, 0, (0, 0), (0, 0))


def test_acceptance_length_includes_the_bonus_token() -> None:
    assert COUNTS.acceptance_length == 2.25  # 1 + 5 / 4


def test_acceptance_rate_is_the_share_of_drafted_tokens() -> None:
    assert COUNTS.acceptance_rate == pytest.approx(5 / 12)


def test_position_rates_divide_by_drafts() -> None:
    assert COUNTS.position_rates == (0.75, 0.25, 0.25)


def test_length_is_one_plus_the_sum_of_the_position_rates() -> None:
    assert COUNTS.acceptance_length == 1 + sum(COUNTS.position_rates)


def test_nothing_accepted_is_not_nothing_drafted() -> None:
    counts = AcceptanceCounts(drafts=2, drafted_tokens=6, accepted_tokens=0, accepted_per_position=(0, 0, 0))
    assert (counts.acceptance_length, counts.acceptance_rate) == (1.0, 0.0)


def test_without_drafts_there_is_no_acceptance() -> None:
    assert NOTHING.acceptance_length is None
    assert NOTHING.acceptance_rate is None
    assert NOTHING.position_rates == ()


def test_a_stretch_is_the_difference_of_two_snapshots() -> None:
    later = AcceptanceCounts(drafts=10, drafted_tokens=30, accepted_tokens=17, accepted_per_position=(9, 5, 3))
    assert later - COUNTS == AcceptanceCounts(6, 18, 12, (6, 4, 2))


def test_snapshots_of_different_draft_lengths_do_not_subtract() -> None:
    with pytest.raises(ValueError, match="counts of 3 and of 2 draft positions"):
        COUNTS - AcceptanceCounts(1, 2, 1, (1, 0))


# Drafts of 3, 3, 1 and 1 tokens, with 3, 0, 1 and 0 of them accepted.
VARYING = AcceptanceCounts(
    drafts=4, drafted_tokens=8, accepted_tokens=4, accepted_per_position=(2, 1, 1), drafted_per_position=(4, 2, 2)
)


def test_position_rates_divide_by_the_drafts_that_reach_a_position() -> None:
    assert VARYING.position_rates == (0.5, 0.5, 0.5)


def test_a_position_that_was_never_drafted_has_no_rate() -> None:
    assert AcceptanceCounts(2, 2, 1, (1, 0), (2, 0)).position_rates == (0.5,)


def test_histogram_is_right_for_drafts_of_any_lengths() -> None:
    assert COUNTS.histogram == (1, 2, 0, 1)
    assert VARYING.histogram == (2, 1, 0, 1)
    assert NOTHING.histogram == ()


def test_counts_of_two_stretches_add_up() -> None:
    assert AcceptanceCounts(8, 16, 8, (4, 2, 2), (8, 4, 4)) == VARYING + VARYING
    assert AcceptanceCounts(8, 20, 9, (5, 2, 2)) == VARYING + COUNTS  # one side does not know


def test_tokens_per_second() -> None:
    assert tokens_per_second(128, 4.0) == 32.0
    assert tokens_per_second(128, 0.0) == 0.0


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([], [], None),
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 2, 3], [1, 9, 3], 1),
        ([1, 2, 3], [1, 2], 2),
        ([], [7], 0),
    ],
)
def test_first_difference(left: list[int], right: list[int], expected: int | None) -> None:
    assert first_difference(left, right) == expected
