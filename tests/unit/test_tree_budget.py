# SPDX-License-Identifier: Apache-2.0
"""What the runner asks of a budget, step by step, and what decides. The kernel is tested in tests/kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")
import torch

from vllm_dflash.budget import StepCosts
from vllm_dflash.compat.metrics.meter import StepMeter
from vllm_dflash.compat.trees import budget as budget_module
from vllm_dflash.compat.trees import costs as costs_module
from vllm_dflash.compat.trees.budget import PROBE_STEPS, TreeBudget
from vllm_dflash.compat.trees.costs import CostProfile, assumed_costs
from vllm_dflash.compat.trees.likelihoods import HostLikelihoods
from vllm_dflash.compat.trees.overhead import Overhead
from vllm_dflash.logs import logger

CPU = torch.device("cpu")
NODES = 4


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    group = SimpleNamespace(world_size=1, broadcast_object=lambda given, src: given)
    monkeypatch.setattr(budget_module, "get_tp_group", lambda: group)


def made_budget(verify_ms: list[float], draft_ms: float = 0.1) -> TreeBudget:
    """Of requests "a" and "b", rows 1 and 0 of the state, which have been given to four slots of context."""
    states = SimpleNamespace(
        req_id_to_index={"a": 1, "b": 0},
        num_computed_tokens_np=np.array([4, 4]),
        prefill_len=SimpleNamespace(np=np.array([4, 4])),
    )
    made = TreeBudget(2, NODES, CPU, StepMeter.on(CPU))
    made.begin(states, torch.zeros(3, dtype=torch.int32), 1, max_total_logits=100)
    table = np.array(verify_ms)
    made.costs = StepCosts(table, np.full(3, draft_ms))
    made._overhead = Overhead(overlaps=False, clock=lambda: 0.0)  # no step takes longer than its parts
    made._store = OfSteps()
    made._store.trees = SimpleNamespace(probs=torch.tensor([[0.9, 0.8, 0.2, 0.1], [0.5, 0.4, 0.3, 0.1]]))
    return made


class OfSteps:
    """What is asked of a TreeStore: for which steps without candidates there are graphs, and whether there are any."""

    def __init__(self, *plain_sizes: int) -> None:
        self.plain_sizes, self.is_plain, self.is_timed = frozenset(plain_sizes), False, False

    @contextmanager
    def timed(self) -> Iterator[None]:
        self.is_timed = True
        yield
        self.is_timed = False

    @contextmanager
    def without_candidates(self) -> Iterator[None]:
        self.is_plain = True
        yield
        self.is_plain = False


def step(budget: TreeBudget, drafts: dict[str, int], others: dict[str, int] | None = None) -> int:
    """One step of the runner's: how many nodes are verified."""
    others = others or dict.fromkeys(drafts, 1)
    planned = {name: others[name] + count for name, count in drafts.items()}
    draft_tokens = {name: [-1] * count for name, count in drafts.items() if count}
    # The runner asks only where something was planned.
    rows = budget.get_num_tokens(planned, draft_tokens) if draft_tokens else sum(others.values())
    state_rows = np.array([{"a": 1, "b": 0}[name] for name in drafts])
    budget.record_confidences(torch.empty(0), SimpleNamespace(idx_mapping_np=state_rows))
    return rows - sum(others.values())


def test_trees_are_known_two_steps_later(one_rank: None) -> None:
    budget = made_budget([1.0] * 6 + [9.0] * 6)
    assert step(budget, {"a": 0, "b": 0}) == 0  # prompts: nothing has been drafted
    assert step(budget, {"a": 4, "b": 4}) == 3  # all likelihoods are one so far, and five rows cost as much as one
    # Now the first trees are known: 2 tokens in 1 ms, 2 + 0.9 + 0.8 in 1.4, all in 3. As if all were likely: 10 in 3.
    budget._costs_in_force = made_budget([1.0] * 3 + [1.4] * 2 + [3.0] * 9, draft_ms=0.0).costs
    assert step(budget, {"a": 4, "b": 4}) == 2


def test_the_log_tells_nothing_of_trees_that_nobody_knows(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("INFO", logger.name)
    budget = made_budget([1.0] * 3 + [1.4] * 2 + [3.0] * 9, draft_ms=0.0)
    step(budget, {"a": 0, "b": 0})
    step(budget, {"a": 4, "b": 4})
    assert "batch of" not in caplog.text
    step(budget, {"a": 4, "b": 4})
    # 2 + 0.9 + 0.8 tokens of two requests
    assert "batch of 2: best are 2 nodes, from which 1.85 tokens a request are expected in 1.40 ms" in caplog.text


#: Where drafting takes half a step more, of so many steps one drafts though it does not pay: 0.25 % of the time.
HALF_A_STEP = 200
#: Of which a draft that takes half a step is worth it, with 2 tokens more, and is not, with a quarter of one.
GOOD, BAD = [0.9, 0.8, 0.2, 0.1], [0.1, 0.08, 0.05, 0.02]


def drafts_after(budget: TreeBudget, tree: list[float], is_prompt: bool = False) -> bool:
    """One step of "a", which gets this tree if it drafts."""
    budget._store.trees.probs = torch.tensor([tree] * 2)
    step(budget, {"a": 0 if is_prompt else 4})
    return budget.drafts


def test_every_other_tree_says_nothing(one_rank: None) -> None:
    budget = made_budget([1.0] * 12, draft_ms=0.5)
    drafts_after(budget, GOOD, is_prompt=True)
    assert all([drafts_after(budget, tree) for tree in [BAD, GOOD] * PROBE_STEPS])
    assert sum([drafts_after(budget, BAD) for _ in range(2 * HALF_A_STEP)][HALF_A_STEP:]) == 1  # whatever was before


def test_hopes_do_not_count(one_rank: None) -> None:
    """Until a tree is known, two steps after it was drafted, all its nodes are taken to be likely."""
    budget = made_budget([1.0] * 12, draft_ms=0.5)
    drafted = [drafts_after(budget, BAD, is_prompt=True)] + [drafts_after(budget, BAD) for _ in range(4)]
    assert drafted == [True, True, False, False, False]


def test_after_a_good_tree_bad_ones_are_put_up_with(one_rank: None) -> None:
    budget = made_budget([1.0] * 12, draft_ms=0.5)
    drafts_after(budget, BAD, is_prompt=True)
    assert not [drafts_after(budget, BAD) for _ in range(4)][-1]
    assert any(drafts_after(budget, GOOD) for _ in range(HALF_A_STEP))
    # The next decision does not know the good tree yet; two look at it; the last one looks at the first bad one.
    assert [drafts_after(budget, BAD) for _ in range(4)] == [False, True, True, True]


def test_nothing_is_verified_that_was_not_drafted(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafting at the price of many steps stops; now and then it is tried again, the more seldom, the dearer it is."""
    for draft_ms, probe_steps in ((50.0, 1024), (1.0, 400), (0.25, 100), (0.05, 48)):
        budget = made_budget([1.0] * 12, draft_ms)
        monkeypatch.setattr(budget._gain, "pays", lambda choice, is_new: False)
        step(budget, {"a": 0, "b": 0})
        assert step(budget, {"a": 4, "b": 4}) == 8 and not budget.drafts  # what the prompts' step drafted
        verified = [step(budget, {"a": 4, "b": 4}) for _ in range(2 * probe_steps)]
        assert [place for place, count in enumerate(verified) if count] == [probe_steps - 1, 2 * probe_steps - 1]
        assert verified[probe_steps - 1] == 8


def test_what_does_not_pay_is_not_looked_at_for_some_steps(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = made_budget([1.0] * 12, draft_ms=0.125)
    monkeypatch.setattr(budget._gain, "pays", lambda choice, is_new: False)
    decisions, decide = [], budget._decide
    monkeypatch.setattr(budget, "_decide", lambda *given: (decisions.append(budget._num_without), decide(*given))[1])
    step(budget, {"a": 0, "b": 0})
    for _ in range(PROBE_STEPS + 3):
        step(budget, {"a": 4, "b": 4})
    # The first drafts no more, as the second knows. Then every sixteen steps; the probe, and what verifies it.
    assert decisions == [0, 1, 17, 33, 49, 0]
    step(budget, {"a": 4, "b": 4})  # settles for some steps, of these two
    step(budget, {"a": 4})  # fewer requests may pay
    step(budget, {"a": 4, "b": 0}, others={"a": 1, "b": 5})
    assert len(decisions) == 9


def test_what_paid_in_between_is_not_counted(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts are so many steps apart, from when drafting last paid."""
    budget, pays = made_budget([1.0] * 12, draft_ms=0.05), [True]
    monkeypatch.setattr(budget._gain, "pays", lambda choice, is_new: pays[0])

    def drafted(steps: int) -> list[bool]:
        return [(step(budget, {"a": 4, "b": 4}), budget.drafts)[1] for _ in range(steps)]

    step(budget, {"a": 0, "b": 0})
    pays[0] = False
    assert not any(drafted(20))
    pays[0] = True
    assert drafted(20)[-1]
    pays[0] = False
    assert drafted(PROBE_STEPS) == [False] * (PROBE_STEPS - 1) + [True]


def test_prompts_in_the_batch(one_rank: None) -> None:
    """Six rows of a prompt that does not end yet: it gains nothing, and its rows are among those that cost."""
    budget = made_budget([1.0] * 9 + [9.0] * 9)
    step(budget, {"a": 0, "b": 0})
    budget._req_states.prefill_len.np[0] = 100
    assert step(budget, {"a": 4, "b": 0}, others={"a": 1, "b": 6}) == 1


@pytest.mark.parametrize(("prefill_len", "verified"), [(10, 0), (11, 1)], ids=["ends", "goes on"])
def test_a_prompt_that_ends_gains_a_token(one_rank: None, prefill_len: int, verified: int) -> None:
    """Of "b" the rows 4 to 9 are read. One node takes 1.7 ms instead of 1.1: 3 tokens to 2, or 2 to 1."""
    budget = made_budget([1.0] * 8 + [1.6] + [9.0] * 9)
    step(budget, {"a": 0, "b": 0})
    budget._req_states.prefill_len.np[0] = prefill_len
    assert step(budget, {"a": 4, "b": 0}, others={"a": 1, "b": 6}) == verified


def test_no_step_leaves_the_graphs_for_its_trees(one_rank: None) -> None:
    """Graphs of up to seven rows, two of them roots', or of a prompt's that run anyway."""
    budget = made_budget([1.0] * 20)
    budget._profile = CostProfile(None, torch.float32, 20, 2, 9999)
    list(budget.batches_to_profile([1, 7]))
    step(budget, {"a": 0, "b": 0})
    assert step(budget, {"a": 4, "b": 4}) == 5
    assert step(budget, {"a": 4, "b": 0}, others={"a": 1, "b": 4}) == 2
    assert step(budget, {"a": 4, "b": 0}, others={"a": 1, "b": 6}) == 0
    assert budget.drafts, "the next step's rows may be few"
    assert step(budget, {"a": 4, "b": 0}, others={"a": 1, "b": 7}) == 4  # a prompt has left them already


def test_room_for_logits(one_rank: None) -> None:
    """Of a row each, and three more; with graphs of twenty rows."""
    budget = made_budget([1.0] * 20)
    budget._profile, budget._max_total_logits = CostProfile(None, torch.float32, 20, 2, 9999), 5
    list(budget.batches_to_profile([20]))
    step(budget, {"a": 0, "b": 0})
    assert step(budget, {"a": 4, "b": 4}) == 3
    budget._costs_in_force = budget.costs and budget.costs.with_overheads((0.0, 0.0), (99.0, 99.0))
    assert [step(budget, {"a": 4, "b": 4}) for _ in range(3)] == [3] * 3, "also of what the host hides"


def test_what_the_host_hides_stays_in_the_graphs(one_rank: None) -> None:
    budget = made_budget([1.0] * 20)
    budget._profile = CostProfile(None, torch.float32, 20, 2, 9999)
    list(budget.batches_to_profile([7]))
    step(budget, {"a": 0, "b": 0})
    budget._costs_in_force = budget.costs and budget.costs.with_overheads((0.0, 0.0), (99.0, 99.0))
    assert [step(budget, {"a": 4, "b": 4}) for _ in range(3)] == [5] * 3


def test_what_the_host_takes_for_the_rows(one_rank: None) -> None:
    budget = made_budget([1.0] * 12)
    planned, scheduled = np.array([4, 2, 0], dtype=np.int32), np.array([5, 3, 7], dtype=np.int32)
    starts = np.array([0, 5, 8, 9], dtype=np.int32)
    for chosen, rows in ((6, [5, 3, 7]), (3, [3, 2, 7]), (1, [1, 2, 7]), (0, [1, 1, 7])):
        budget._num_planned, budget._chosen = 6, chosen
        tokens, bounds = budget.compact_batch(planned, scheduled, starts)
        assert tokens.tolist() == rows and tokens.dtype == np.int32
        assert bounds.tolist() == ([0, 1, 2, 3] if chosen == 0 else starts.tolist())


def test_ranks_agree_on_what_they_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = ((3.0, 4.0), (5.0, 6.0))
    group = SimpleNamespace(world_size=2, broadcast_object=lambda given, src: theirs)
    monkeypatch.setattr(budget_module, "get_tp_group", lambda: group)
    budget = made_budget([1.0] * 12)
    step(budget, {"a": 0, "b": 0})
    assert (budget._costs_now().overheads_ms, budget._costs_now().host_ms) == theirs


def test_overheads_are_looked_at_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([((1.0, 1.0), (0.0, 0.0)), ((3.0, 4.0), (5.0, 6.0))])
    group = SimpleNamespace(world_size=2, broadcast_object=lambda given, src: next(seen))
    monkeypatch.setattr(budget_module, "get_tp_group", lambda: group)
    budget = made_budget([1.0] * 12)
    assert [budget._costs_now().overheads_ms for _ in range(34)] == [(1.0, 1.0)] * 32 + [(3.0, 4.0)] * 2


def test_a_new_table_is_in_force_at_once(one_rank: None) -> None:
    budget = made_budget([1.0] * 12)
    assert budget._costs_now().verify_ms[1] == 1.0
    other = made_budget([2.0] * 12).costs
    budget._profile = SimpleNamespace(planned=[(1, 0)], costs=lambda samples: other)  # type: ignore[assignment]
    budget.set_initial_cost_curves([])
    assert budget._costs_now().verify_ms[1] == 2.0


def test_a_runner_that_begins_again_may_have_more_requests(one_rank: None) -> None:
    budget = made_budget([1.0] * 12)
    assert budget._bounds_of(1).tolist() == [0, 2, 4]
    budget.begin(budget._req_states, torch.zeros(5, dtype=torch.int32), 1, max_total_logits=100)
    assert budget._bounds_of(1).tolist() == [0, 2, 4, 6, 8]


def test_where_the_host_s_plan_is_right(one_rank: None) -> None:
    """All nodes or none: the device has nothing to share out, and what the runner has written stands."""
    budget = made_budget([1.0] * 12)
    planned, scheduled = np.array([4, 2], dtype=np.int32), np.array([5, 3], dtype=np.int32)
    for chosen, expected in ((6, [0, 5, 8]), (0, [0, 1, 2])):
        budget._num_planned, budget._chosen = 6, chosen
        budget.compact_batch(planned, scheduled, np.array([0, 5, 8], dtype=np.int32))
        budget._query_start_loc.copy_(torch.tensor([0, 7, 9]))
        bounds, starts, count = budget.reallocate_drafts(["a", "b"], torch.tensor([1, 0]))
        assert (bounds.tolist(), starts.tolist(), count) == (expected, [0, 7, 9], chosen)


def test_one_request_and_equal_ones_need_no_sharing(one_rank: None) -> None:
    budget = made_budget([1.0] * 12)
    for planned, chosen, expected in (([4], 3, [0, 4]), ([3, 3], 6, [0, 4, 8]), ([4], 0, [0, 1])):
        budget._num_planned, budget._chosen = sum(planned), chosen
        counts = np.array(planned, dtype=np.int32)
        budget.compact_batch(counts, counts + 1, np.zeros(len(planned) + 1, dtype=np.int32))
        req_ids = ["a", "b"][: len(planned)]
        bounds, _, count = budget.reallocate_drafts(req_ids, torch.arange(len(planned)))
        assert (bounds.tolist(), bounds.dtype, count) == (expected, torch.int32, chosen)


def test_plans_of_an_even_sum_need_not_be_even(one_rank: None) -> None:
    budget = made_budget([1.0] * 12)
    budget._cu_num_logits = torch.zeros(4, dtype=torch.int32)
    budget._num_planned = budget._chosen = 9
    planned = np.array([3, 4, 2], dtype=np.int32)
    budget.compact_batch(planned, planned + 1, np.array([0, 4, 9, 12], dtype=np.int32))
    assert budget.reallocate_drafts(["a", "b", "c"], torch.arange(3))[0].tolist() == [0, 4, 9, 12]


def test_what_the_host_hides_is_verified_for_some_steps(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are dear for the device, and a host that takes longer: trees are looked at every sixteenth step.

    Of these steps the last three leave a mark, and the step after a mark sees how far the device is.
    """
    budget = made_budget([1.0] * 3 + [50.0] * 8 + [500.0], draft_ms=0.0)
    step(budget, {"a": 0, "b": 0})
    assert step(budget, {"a": 4, "b": 4}) == 0
    budget._costs_in_force = budget.costs and budget.costs.with_overheads((0.0, 0.0), (99.0, 99.0))
    copies: list[int] = []
    marks: list[int] = []
    looked: list[int] = []
    verified: list[int] = []
    for name, seen in (("copy", copies), ("mark", marks)):
        method = getattr(budget._likelihoods, name)
        spy = lambda *given, method=method, seen=seen: (seen.append(len(verified)), method(*given))  # noqa: E731
        monkeypatch.setattr(budget._likelihoods, name, spy)
    while len(verified) < 28:
        verified.append(step(budget, {"a": 4, "b": 4}))
        assert budget._overhead._step is not None and budget._overhead._step.gpu_ms == 50.0
        if budget._overhead._step.waited_ms is not None:
            looked.append(len(verified) - 1)
    assert verified == [8] * 28
    assert copies == marks == [13, 14, 15]
    assert looked == [0, 14, 15, 16]
    # A request that ends, one that comes, and its prompt change nothing while the host hides their rows.
    budget.add_request(0)
    with monkeypatch.context() as patched:
        patched.setattr(budget, "_decide", None)
        assert [step(budget, {"a": 4}), step(budget, {"a": 4, "b": 0}, others={"a": 1, "b": 5})] == [4, 4]
    assert step(budget, {"a": 4, "b": 0}, others={"a": 1, "b": 6}) == 3


# Likelihoods.


def test_likelihoods_of_new_and_old_requests() -> None:
    known = HostLikelihoods(3, 2, CPU)
    probs = torch.tensor([[0.9, 0.5], [0.7, 0.1], [0.3, 0.2]])
    assert known.read() is None  # nobody has looked how far the device is
    known.copy(probs, np.array([0, 1]))
    assert known.of(np.array([0])).tolist() == [[1.0, 1.0]]  # under way
    assert known.read() == 0.0
    assert known.of(np.array([0, 1])).tolist() == pytest.approx(probs[:2].double().numpy())
    known.expect_average(1)
    assert known.of(np.array([1]))[0].tolist() == pytest.approx([0.8, 0.3])


def test_what_is_expected_follows_the_news_slowly() -> None:
    """Every eighth ones make a quarter of it; the first make all."""
    known = HostLikelihoods(1, 1, CPU)
    for likelihood in [0.8, *[0.1] * 7, 0.4]:
        known.copy(torch.tensor([[likelihood]]), np.array([0]))
        known.read()
    assert known.average.tolist() == pytest.approx([0.75 * 0.8 + 0.25 * 0.4])


def test_a_new_request_is_not_taken_for_its_row_s_last_one() -> None:
    known = HostLikelihoods(2, 2, CPU)
    probs = torch.tensor([[0.9, 0.5], [0.7, 0.1]])
    known.copy(probs, np.array([0, 1]))
    known.expect_average(0)
    known.read()
    assert known.of(np.array([0])).tolist() == [[1.0, 1.0]]
    assert known.of(np.array([1]))[0].tolist() == pytest.approx([0.7, 0.1])


# Overheads.


def test_what_steps_take_beyond_their_parts() -> None:
    times = iter([0.0, 0.010, 0.022, 1.022, 1.030])
    overhead = Overhead(overlaps=False, clock=lambda: next(times))
    for gpu_ms, drafts in ((4.0, True), (5.0, True), (5.0, True), (6.0, False)):
        overhead.begin_step(2)
        overhead.note(gpu_ms, drafts)
    overhead.begin_step(2)
    # 10 - 4, 12 - 5, and a pause of 995 that the median leaves out; 8 - 6 without drafting.
    assert overhead.ms(2) == (pytest.approx((2.0, 7.0)), (0.0, 0.0))


def test_where_the_host_sets_the_pace() -> None:
    """It never waits, so nothing is known of the device but that it is faster."""
    times = iter([0.0, 0.010, 0.022, 0.030])
    overhead = Overhead(overlaps=True, clock=lambda: next(times))
    for drafts in (True, True, False):
        overhead.begin_step(2)
        overhead.waited(0.0)
        overhead.note(4.0, drafts)
    overhead.begin_step(2)
    assert overhead.ms(2) == ((0.0, 0.0), pytest.approx((8.0, 11.0)))


def test_where_the_device_sets_the_pace() -> None:
    """A step then ends when the device has ended the one before."""
    times = iter([0.0, 0.010, 0.022, 0.036])
    overhead = Overhead(overlaps=True, clock=lambda: next(times))
    for gpu_ms, drafts, waited_ms in ((9.0, True, 0.0), (7.0, True, 5.0), (99.0, False, 6.0)):
        overhead.begin_step(2)
        overhead.waited(waited_ms)
        overhead.note(gpu_ms, drafts)
    overhead.begin_step(2)
    # The device: 12 - 9, 14 - 7. The host: 10 and 12 - 5 with drafting, 14 - 6 without.
    assert overhead.ms(2) == (pytest.approx((5.0, 5.0)), pytest.approx((8.0, 8.5)))


def test_steps_in_which_nobody_looked_at_the_device_do_not_count() -> None:
    """They may have waited for it anywhere."""
    times = iter([0.0, 0.010, 0.040])
    overhead = Overhead(overlaps=True, clock=lambda: next(times))
    for waited_ms in (0.0, None):
        overhead.begin_step(2)
        overhead.waited(waited_ms)
        overhead.note(4.0, True)
    overhead.begin_step(2)
    assert overhead.ms(2) == ((0.0, 0.0), pytest.approx((10.0, 10.0)))


def test_steps_that_nobody_noted_do_not_count() -> None:
    times = iter([0.0, 0.5, 0.51])
    overhead = Overhead(overlaps=False, clock=lambda: next(times))
    overhead.begin_step(2)  # a prompt
    overhead.begin_step(2)
    overhead.note(8.0, True)
    overhead.begin_step(2)
    assert overhead.ms(2)[0] == pytest.approx((2.0, 2.0))  # without drafting nothing was seen: as with it


def test_overheads_are_those_of_about_as_many_requests() -> None:
    clock = iter([0.0, 0.020, 0.023, 0.123])
    overhead = Overhead(overlaps=False, clock=lambda: next(clock))
    for num_reqs, gpu_ms in ((255, 5.0), (1, 2.0), (128, 100.0)):
        overhead.begin_step(num_reqs)
        overhead.note(gpu_ms, drafts=True)
    overhead.begin_step(1)
    # 20 - 5 and 100 - 100 of the large ones, 3 - 2 of the small one.
    assert [overhead.ms(num_reqs)[0] for num_reqs in (128, 255, 1)] == [pytest.approx((x, x)) for x in (7.5, 7.5, 1.0)]
    assert overhead.ms(64) == overhead.ms(256) == overhead.ms(2) == ((0.0, 0.0), (0.0, 0.0))


def seen_after(steps: list[tuple[str, int, float, float]]) -> Any:
    """Overheads of one request's steps that the table says take 2 ms.

    Each: whose it is, nodes planned (0: it is a prompt's), milliseconds to the next one, and of these the host's wait.
    """
    budget, now = made_budget([2.0] * 12), [0.0]
    budget._overhead = Overhead(overlaps=True, clock=lambda: now[0])
    for name, num_nodes, ms, waited_ms in steps:
        budget._likelihoods.read = lambda waited_ms=waited_ms: waited_ms  # type: ignore[method-assign]
        step(budget, {name: num_nodes})
        now[0] += ms / 1e3
    return budget._overhead.ms(1)


def test_prompts_alone_are_no_overhead(one_rank: None) -> None:
    """The runner asks nothing of such a step, which the next verification waits for."""
    steps = [("b", 0, 3.0, 0.0), ("a", 4, 93.0, 90.0), ("a", 4, 3.0, 0.0)]
    assert seen_after(5 * steps) == ((0.0, 0.0), pytest.approx((3.0, 3.0)))


def test_pauses_are_no_overhead(one_rank: None) -> None:
    """Requests that come after ten minutes each, of prompts that are cached but for one token, for two steps."""
    steps = [(name, 4, ms, 0.0) for name in ("a", "b") for ms in (3.0, 600e3)]
    assert seen_after(5 * steps) == ((0.0, 0.0), pytest.approx((3.0, 3.0)))
    assert seen_after(5 * steps[1::2]) == ((0.0, 0.0), (0.0, 0.0))


# Costs.


def profile(
    samples: dict[tuple[int, int], tuple[float, float]],
    monkeypatch: pytest.MonkeyPatch,
    longest_context: int = 9999,
    spared_ms: dict[int, float] | None = None,
    captured: tuple[int, ...] = (1, 2, 8),
    max_num_rows: int = 16,
    max_num_reqs: int = 4,
) -> StepCosts:
    """Of a runner whose made-up steps take (forward, draft) ms by (rows, context).

    `spared_ms`: how much less without candidates, by rows.
    """
    made = CostProfile(None, torch.float32, max_num_rows, max_num_reqs, longest_context)
    monkeypatch.setattr(made, "_logits_ms", lambda: 0.25 * np.ones(max_num_rows + 1))
    timed: list[Any] = []
    store: Any = OfSteps(*(spared_ms or {}), 5)  # 5 has not been captured
    for batch in made.batches(list(captured), store):
        assert batch.keys() == {"num_tokens", "context_len", "randomize_inputs"} and batch["randomize_inputs"]
        forward_ms, drafter_ms = samples[batch["num_tokens"], batch["context_len"]]
        assert store.is_timed
        forward_ms -= (spared_ms or {})[batch["num_tokens"]] if store.is_plain else 0.0
        noise = 50.0 if not len(timed) % 4 else 0.0  # the first of each
        timed.append(
            SimpleNamespace(
                forward_ms=forward_ms + noise,
                drafter_ms=drafter_ms,
                num_reqs=min(batch["num_tokens"], max_num_reqs),
                full_cudagraph=batch["num_tokens"] <= captured[-1],
            )
        )
    return made.costs(timed)


def test_tables_of_timed_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    found = profile(
        {
            (1, 0): (1.0, 0.3),
            (2, 0): (1.5, 0.4),
            (8, 0): (2.0, 0.6),
            (16, 0): (4.0, 99.0),  # without a graph
            (1, 512): (1.125, 0.3),
            (2, 512): (1.875, 0.4),
            (8, 512): (2.5, 0.6),
            (8, 4096): (2.5 + 4 * 3584 * 1e-5, 0.6),
        },
        monkeypatch,
        spared_ms={1: 0.125, 2: 0.25},
    )
    # Of the eight rows four are requests. Three and four have no graph without candidates.
    assert found.trees_ms is not None and found.trees_ms.tolist() == pytest.approx([0, 0.125, 0.25, 0.375, 0.5])
    assert found.verify_ms[[1, 2, 3, 8, 9, 16]].tolist() == pytest.approx([1.125, 1.5, 1.75, 1.75, 4.25, 4.25])
    assert found.draft_ms.tolist() == pytest.approx([0.3, 0.3, 0.4, 0.6, 0.6])
    assert found.context_ms == pytest.approx(1e-5)
    assert found.attention_ms is not None
    assert found.attention_ms.tolist() == pytest.approx([0, 0.125, 0.375, 0.4375, 0.5])
    # Of eight rows only two are requests, with twice the context that such were measured with.
    assert found.gpu_ms(8, 2, 2048.0, drafts=False) == pytest.approx(1.75 + 0.25 + 0.375 + 1024 * 1e-5)
    assert found.gpu_ms(8, 2, 1024.0, drafts=True) == pytest.approx(1.75 + 0.25 + 0.375 + 0.4)
    assert found.gpu_ms(2, 2, 1024.0, drafts=False) == pytest.approx(1.5 + 0.375)


def test_attention_of_more_requests_takes_no_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that seems faster than a smaller one is noise; between two sizes lines."""
    samples = {(rows, 0): (1.0, 0.5) for rows in (1, 4, 6, 8, 12)}
    samples |= {(1, 512): (1.3, 0.5), (4, 512): (1.6, 0.5), (6, 512): (1.5, 0.5)}
    samples |= {(6, 4096): (1.5, 0.5)}
    found = profile(samples, monkeypatch, captured=(1, 4, 6, 8), max_num_rows=12, max_num_reqs=6)
    assert found.attention_ms is not None
    assert found.attention_ms.tolist() == pytest.approx([0.0, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6])
    assert found.context_ms == 0.0


def test_fewer_requests_than_the_smallest_graph_has_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    ms = {(8, 0): 1.0, (16, 0): 2.0, (8, 512): 1.5, (8, 4096): 1.5 + 4 * 3584 * 1e-5}
    found = profile({step: (forward_ms, 0.5) for step, forward_ms in ms.items()}, monkeypatch, captured=(8, 16))
    assert found.attention_ms is not None and found.attention_ms.tolist() == [0.0, 0.125, 0.25, 0.375, 0.5]
    assert found.context_ms == pytest.approx(1e-5)


def test_more_requests_than_any_graph_has_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reading takes goes on in proportion."""
    samples = {(1, 0): (1.0, 0.5), (2, 0): (1.0, 0.5), (4, 0): (3.0, 0.5), (1, 512): (1.125, 0.5), (2, 512): (1.5, 0.5)}
    found = profile(samples, monkeypatch, 512, captured=(1, 2), max_num_rows=8, max_num_reqs=6)
    assert found.attention_ms is not None
    assert found.attention_ms.tolist() == pytest.approx([0.0, 0.125, 0.5, 0.75, 1.0, 1.25, 1.5])


@pytest.mark.parametrize("slopes", [(1e-5, 2e-5), (2e-5, 1e-5)])
def test_a_slot_costs_what_the_faster_of_two_batches_says(
    slopes: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first one of 32 requests or more, and the largest."""
    samples = {(rows, context): (1.0, 0.5) for rows in (8, 32, 48, 64, 96) for context in (0, 512)}
    samples |= {(rows, 4096): (1.0 + rows * 3584 * slope, 0.5) for rows, slope in zip((32, 64), slopes, strict=True)}
    found = profile(samples, monkeypatch, captured=(8, 32, 48, 64), max_num_rows=96, max_num_reqs=64)
    assert found.context_ms == pytest.approx(1e-5)


def test_short_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no request can be long, further slots are not priced."""
    samples = {(rows, 0): (1.0 * rows, 0.5) for rows in (1, 2, 8, 16)}
    samples |= {(1, 300): (1.25, 0.5), (2, 300): (2.5, 0.5), (8, 300): (9.0, 0.5)}
    found = profile(samples, monkeypatch, longest_context=300)
    assert found.context_ms == 0 and found.profiled_context == 300
    assert found.gpu_ms(1, 1, 200.0, drafts=False) == found.gpu_ms(1, 1, 300.0, drafts=False) == 1.5


def test_no_context_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    found = profile({(rows, 0): (1.0, 0.5) for rows in (1, 2, 8, 16)}, monkeypatch, longest_context=0)
    assert found.attention_ms is not None and not found.attention_ms.any() and found.context_ms == 0


def test_nothing_is_captured_whole(one_rank: None) -> None:
    """Then nothing is timed, and costs are assumed."""
    budget = made_budget([1.0] * 12)
    budget.costs = None
    budget._req_states.max_num_batched_tokens, budget._req_states.max_num_reqs = 256, 2
    budget._profile = CostProfile(None, torch.float32, 256, 2, 9999)
    assert list(budget.batches_to_profile([])) == []
    budget.set_initial_cost_curves([])
    step(budget, {"a": 0, "b": 0})
    assert step(budget, {"a": 4, "b": 4}) == 8


@pytest.mark.parametrize(
    ("last_ms", "at_2048"), [(0.9, 1.0), (2.0, 2.0 + 1024 * (2.0 - 1.0) / 512)], ids=["noise", "more"]
)
def test_logits_of_more_rows_take_no_less(monkeypatch: pytest.MonkeyPatch, last_ms: float, at_2048: float) -> None:
    """Beyond the last size as between the last two, unless these are noise."""
    target = torch.nn.Linear(4, 4)
    target.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=4))  # type: ignore[assignment]
    times = iter([0.5, 0.5, 0.6, 0.7, 0.8, 1.0, last_ms])  # of 1 to 1024 rows
    monkeypatch.setattr(costs_module, "_gpu_ms", lambda run: next(times))
    found = CostProfile(target, torch.float32, 2048, 4, 9999)._logits_ms()
    assert found[[1, 512, 2048]].tolist() == pytest.approx([0.5, 1.0, at_2048])


def test_steps_that_were_not_timed() -> None:
    made = CostProfile(None, torch.float32, 16, 4, 9999)
    store: Any = OfSteps()
    assert len(list(made.batches([1], store))) > 0
    with pytest.raises(RuntimeError, match="steps were planned, 0 timed"):
        made.costs([])


def test_assumed_costs_are_flat_and_then_proportional() -> None:
    assumed = assumed_costs(512, 4)
    assert assumed.verify_ms[[1, 128, 256, 512]].tolist() == [1.0, 1.0, 2.0, 4.0]


def test_break_even_is_the_ratio_of_two_steps(one_rank: None) -> None:
    """Two requests: 2 ms without drafts; 2.5 ms for the six rows that pay, and 0.5 ms of drafting."""
    budget = made_budget([2.0] * 3 + [2.5] * 4 + [99.0] * 6, draft_ms=0.5)
    step(budget, {"a": 0, "b": 0})
    assert budget.break_even is None
    assert step(budget, {"a": 4, "b": 4}) == 4
    assert budget.break_even == pytest.approx(1.5)
    assert budget.num_reqs == 2
