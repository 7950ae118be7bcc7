# SPDX-License-Identifier: Apache-2.0
"""Whether steps draft, by what their trees were worth."""

from __future__ import annotations

from vllm_dflash.budget import Choice
from vllm_dflash.drafting_rule import (
    COMPARE_EVERY,
    COMPARE_FIRST,
    COMPARED_STEPS,
    PROBE_STEPS,
    DraftingGain,
    DraftingRule,
)


def worth(gain: float, expected: float = 2.0) -> Choice:
    return Choice(1, expected, 1.0, gain)


def test_one_tree_that_says_nothing_does_not_end_drafting() -> None:
    gain = DraftingGain()
    assert all(gain.pays(worth(1.0), is_new=True) for _ in range(16))
    assert all(gain.pays(worth(-0.5), is_new=True) for _ in range(17))  # 1.5 * (15/16)**17 = 0.5007
    assert not gain.pays(worth(-0.5), is_new=True)


def test_the_first_trees_are_averaged_alike() -> None:
    gain = DraftingGain()
    pays = [gain.pays(worth(value), is_new=True) for value in (0.6, -0.4, -0.1, -0.2)]
    assert pays == [True, True, True, False]  # sums of 0.6, 0.2, 0.1, -0.1


def test_a_new_attempt_is_not_held_back_by_old_losses() -> None:
    gain = DraftingGain()
    assert not any(gain.pays(worth(-2.0), is_new=True) for _ in range(20))
    assert gain.pays(worth(0.6), is_new=True) and gain.pays(worth(-0.5), is_new=True)


def test_trees_that_were_asked_about_before() -> None:
    gain = DraftingGain()
    assert gain.pays(worth(0.3), is_new=True)
    assert all(gain.pays(worth(-0.2), is_new=False) for _ in range(20))
    assert gain.pays(worth(-0.2), is_new=True)


def without_drafts(choices: list[Choice], num_reqs: int = 1, first: int = 0, is_timed: bool = True) -> list[int]:
    """The steps that draft nothing, of one after another."""
    rule = DraftingRule()
    drafts = [rule.drafts(choice, first + at, num_reqs, True, is_timed) for at, choice in enumerate(choices)]
    return [at for at, does in enumerate(drafts) if not does]


def test_now_and_then_some_steps_do_without() -> None:
    first, second = COMPARE_FIRST, COMPARE_FIRST + COMPARE_EVERY
    found = without_drafts([worth(0.5)] * (second + COMPARE_EVERY))
    assert found == [*range(first, first + COMPARED_STEPS), *range(second, second + COMPARED_STEPS)]


def test_what_no_step_without_drafts_can_beat_is_not_compared() -> None:
    """Two requests: with six tokens a step they are, with five and a half they are not three times as fast."""
    assert without_drafts([worth(2.0, expected=6.0)] * 600, num_reqs=2) == []
    assert len(without_drafts([worth(2.0, expected=5.5)] * 250, num_reqs=2)) == COMPARED_STEPS


def test_steps_that_tell_nothing_are_not_spent_on_it() -> None:
    assert without_drafts([worth(0.5)] * 600, is_timed=False) == []


def test_where_nothing_is_drafted_there_is_no_comparison_behind_a_probe() -> None:
    """The probe shows that drafting pays again: what steps without it take is known."""
    choices = [worth(-1.0)] * (PROBE_STEPS - 1) + [worth(-1.0)] + [worth(0.5)] * 200
    assert without_drafts(choices, first=1000) == [*range(PROBE_STEPS - 1)]
