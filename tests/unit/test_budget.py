# SPDX-License-Identifier: Apache-2.0
"""How many nodes a batch verifies: worked out by hand, and against a search through every number."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dflash.budget import Choice, DraftingGain, StepCosts, choose, stepped


def costs(verify_ms: list[float], draft_ms: float = 0.0, context_ms: float = 0.0) -> StepCosts:
    """Of steps of 0, 1, 2, ... rows."""
    return StepCosts(np.array(verify_ms), np.full(9, draft_ms), context_ms)


def test_flat_costs_are_used_up() -> None:
    """One request, whose root is a row too: four more rows cost nothing, the fifth doubles the step."""
    choice = choose(np.array([0.9, 0.5, 0.3, 0.2, 0.1, 0.1]), 1, 1, 1, 0.0, costs([1.0] * 6 + [2.0] * 4))
    assert choice.budget == 4
    assert choice.expected == pytest.approx(1 + 0.9 + 0.5 + 0.3 + 0.2)
    assert choice.step_ms == 1.0 and choice.is_worth_drafting


def test_rows_that_cost_as_much_as_they_give() -> None:
    """Each row costs a tenth of a step more."""
    rising = [1 + 0.1 * rows for rows in range(10)]
    # 1 / 1.1, 1.9 / 1.2, 2.4 / 1.3 = 1.846, 2.5 / 1.4 = 1.786
    assert choose(np.array([0.9, 0.5, 0.1]), 1, 1, 1, 0.0, costs(rising)).budget == 2


def test_what_drafting_costs() -> None:
    """Verifying 2.4 tokens instead of 1 pays for a draft of 1.4 steps, and for no longer one."""
    likelihoods, flat = np.array([0.9, 0.5]), [1.0] * 10
    pays, does_not = (choose(likelihoods, 1, 1, 1, 0.0, costs(flat, draft_ms)) for draft_ms in (1.3, 1.5))
    assert pays.is_worth_drafting and pays.gain == pytest.approx(0.1)
    assert not does_not.is_worth_drafting and does_not.gain == pytest.approx(-0.1)


def test_gains_are_those_of_a_request() -> None:
    """Two requests, 2 + 0.9 + 0.5 tokens in 1.5 ms instead of 2 in 1."""
    choice = choose(np.array([0.9, 0.5]), 2, 2, 2, 0.0, costs([1.0] * 10, draft_ms=0.5))
    assert choice.gain == pytest.approx((3.4 - 3.0) / 2)
    # Prompts that end later: no token without drafts.
    assert choose(np.array([0.9]), 0, 1, 1, 0.0, costs([1.0] * 10)).gain == pytest.approx(0.9)


def test_steps_without_candidates_may_take_less() -> None:
    """Candidates of two requests' take 0.25 ms, of one request's 0.125."""
    some = replace(costs([0.75] * 10, draft_ms=0.5), trees_ms=np.array([0.0, 0.125, 0.25]))
    assert some.step_ms(2, 2, 0.0, drafts=False) == 0.75
    assert some.step_ms(2, 1, 0.0, drafts=False) == 0.875
    assert some.steps_ms(2, 4, 2, 0.0).tolist() == [1.25, 1.5, 1.5]
    assert some.steps_ms(5, 7, 2, 0.0).tolist() == [1.25, 1.5, 1.5]  # beside a prompt
    late = some.with_overheads((0.0, 0.0), (1.5, 1.6))
    assert late.hidden_rows(2, 0.0) == -1 and late.hidden_rows(1, 0.0) == 9  # 1.5 and 1.375 of 1.44
    choice = choose(np.array([0.9, 0.5]), 2, 2, 2, 0.0, some)
    assert (choice.budget, choice.gain) == (2, pytest.approx((3.4 - 2 * 1.5 / 0.75) / 2))


def worth(gain: float) -> Choice:
    return Choice(1, 2.0, 1.0, gain, plain_ms=1.0)


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


def test_overheads_of_either_kind() -> None:
    """A host that takes long makes rows cheap; one that takes long only where it drafts makes drafts dear."""
    rising, likelihoods = costs([1 + 0.5 * rows for rows in range(10)]), np.array([0.9, 0.3])
    assert choose(likelihoods, 1, 1, 1, 0.0, rising).budget == 1
    assert choose(likelihoods, 1, 1, 1, 0.0, rising.with_overheads((5.0, 5.0), (0.0, 0.0))).budget == 2
    assert not choose(likelihoods, 1, 1, 1, 0.0, rising.with_overheads((0.0, 5.0), (0.0, 0.0))).is_worth_drafting


def test_what_the_host_hides_is_free() -> None:
    """Steps of 1.5, 2, 2.5, ... ms while the host needs 2.2: a second row costs nothing, a third 0.3 ms."""
    rising = costs([1 + 0.5 * rows for rows in range(10)])
    hidden = rising.with_overheads((0.0, 0.0), (2.2, 2.2))
    # 1.2 / 2 instead of 1 / 1.5; 1.2 / 2.2 instead of 1 / 2.2, and 1.4 / 2.5.
    assert choose(np.array([0.2]), 1, 1, 1, 0.0, rising).budget == 0
    assert choose(np.array([0.2, 0.1]), 1, 1, 1, 0.0, hidden).budget == 1
    assert choose(np.array([0.2, 0.19]), 1, 1, 1, 0.0, hidden).budget == 2
    assert hidden.step_ms(1, 1, 0.0, drafts=False) == 2.2 and hidden.step_ms(3, 1, 0.0, drafts=False) == 2.5
    assert hidden.hidden_rows(1, 0.0) == 1  # 2 of 2.2 is too close
    assert rising.hidden_rows(1, 0.0) == -1 and rising.with_overheads((0.0, 0.0), (9.0, 9.0)).hidden_rows(1, 0.0) == 9


def test_a_host_that_is_slower_where_it_drafts() -> None:
    flat = costs([1.0] * 10)
    assert choose(np.array([0.4]), 1, 1, 1, 0.0, flat.with_overheads((0.0, 0.0), (2.0, 2.7))).is_worth_drafting
    assert not choose(np.array([0.4]), 1, 1, 1, 0.0, flat.with_overheads((0.0, 0.0), (2.0, 3.0))).is_worth_drafting


def test_a_long_context_makes_rows_cheap() -> None:
    rising, likelihoods = costs([1 + 0.5 * rows for rows in range(10)], context_ms=0.001), np.array([0.9, 0.3])
    assert choose(likelihoods, 1, 1, 1, 100.0, rising).budget == 1
    assert choose(likelihoods, 1, 1, 1, 10_000.0, rising).budget == 2


def test_what_context_costs() -> None:
    """Of two requests the first 200 slots take 0.5 ms, each of the others 1 us; fewer take no less than nothing."""
    some = replace(costs([1.0] * 10), attention_ms=np.array([0.0, 0.375, 0.5]), profiled_context=100, context_ms=0.001)
    assert some.step_ms(2, 2, 200.0, drafts=False) == pytest.approx(1.5)
    assert some.step_ms(9, 2, 700.0, drafts=False) == pytest.approx(2.0)
    assert some.step_ms(9, 1, 50.0, drafts=False) == pytest.approx(1.325)
    assert replace(some, context_ms=0.01).step_ms(9, 1, 20.0, drafts=False) == 1.0
    assert some.steps_ms(2, 3, 2, 300.0).tolist() == pytest.approx([1.6, 1.6])


def test_no_more_rows_than_there_are_costs_for() -> None:
    assert choose(np.ones(9), 2, 2, 2, 0.0, costs([1.0] * 5)).budget == 2
    assert choose(np.ones(9), 2, 6, 2, 0.0, costs([1.0] * 7)).budget == 0


def test_prompts_gain_nothing_yet() -> None:
    """Nodes of one request beside a prompt's 5 rows, none of which gives a token."""
    choice = choose(np.array([0.5]), 1, 6, 2, 0.0, costs([1.0] * 9))
    assert choice.expected == pytest.approx(1.5)


@given(
    likelihoods=st.lists(st.floats(0.0, 1.0), max_size=12),
    verify=st.lists(st.floats(0.1, 5.0), min_size=16, max_size=16),
    num_reqs=st.integers(1, 3),
)
def test_no_other_number_is_better(likelihoods: list[float], verify: list[float], num_reqs: int) -> None:
    descending = sorted(likelihoods, reverse=True)
    choice = choose(np.array(descending), num_reqs, num_reqs, num_reqs, 0.0, costs(sorted(verify), draft_ms=0.5))
    rates = [
        (num_reqs + sum(descending[:budget])) / (sorted(verify)[num_reqs + budget] + 0.5)
        for budget in range(len(descending) + 1)
    ]
    assert rates[choice.budget] == pytest.approx(max(rates))


def test_a_table_of_captured_sizes() -> None:
    """Between sizes a step is padded to the next; a size that seems faster than a smaller one is noise."""
    table = stepped([(1, 1.0), (4, 3.0), (6, 2.5), (8, 4.0)], 10)
    assert table.tolist() == [1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0, 4.0, 4.0, 4.5, 5.0]
    assert stepped([(2, 7.0)], 4).tolist() == [7.0] * 5


def test_a_summary_names_sizes() -> None:
    text = costs([1.0] * 20, draft_ms=0.25, context_ms=2e-6).summary()
    assert "1 1.00, 16 1.00" in text and "8 0.25" in text and "2.00 ms for each million" in text
    read = replace(costs([1.0] * 20), attention_ms=np.arange(9.0), profiled_context=512).summary()
    assert "reading 512 slots each, ms by requests: 1 1.00, 8 8.00;" in read
    trees = replace(costs([1.0] * 20, draft_ms=0.25), trees_ms=np.full(20, 0.375)).summary()
    assert "more for trees, ms by requests: 1 0.38, 8 0.38; drafting, ms by requests: 1 0.25, 8 0.25;" in trees
