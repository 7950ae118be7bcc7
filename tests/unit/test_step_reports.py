# SPDX-License-Identifier: Apache-2.0
"""What a worker reports of a step, on its way over the runner's output and vLLM's statistics to /metrics."""

from __future__ import annotations

import pickle
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")
import msgspec
from vllm import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from tests.helpers import drafter_config
from vllm_dflash.cadence import PrefillCadence
from vllm_dflash.compat import ownership, patching, prefill_cadence
from vllm_dflash.compat.metrics import runners, scheduler, wire
from vllm_dflash.compat.metrics.fallbacks import Fallback
from vllm_dflash.compat.metrics.report import BudgetInForce, StepReport, StepTimes
from vllm_dflash.compat.verified_nodes import not_verified
from vllm_dflash.config import DFlashConfig

NUM_REASONS = 7


@pytest.fixture(autouse=True)
def nothing_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "_originals", {})


# Of the planned nodes, those that were not verified.


@pytest.mark.parametrize(
    ("planned", "num_verified", "expected"),
    [
        ({"a": 4, "b": 2, "c": 2}, 4, {"a": 2, "b": 1, "c": 1}),
        ({"a": 3, "b": 3}, 6, {"a": 0, "b": 0}),
        ({"a": 3, "b": 3}, 0, {"a": 3, "b": 3}),
        ({}, 0, {}),
    ],
)
def test_by_hand(planned: dict[str, int], num_verified: int, expected: dict[str, int]) -> None:
    assert not_verified(planned, num_verified) == expected


@given(counts=st.lists(st.integers(1, 63), min_size=1, max_size=20), data=st.data())
def test_the_sum_is_right(counts: list[int], data: st.DataObject) -> None:
    planned = {str(index): count for index, count in enumerate(counts)}
    num_verified = data.draw(st.integers(0, sum(counts)))
    missing = not_verified(planned, num_verified)
    assert sum(counts) - sum(missing.values()) == num_verified
    assert all(0 <= missing[name] <= count for name, count in planned.items())


# The runner.


def output_of(*req_ids: str) -> ModelRunnerOutput:
    return ModelRunnerOutput(req_ids=list(req_ids), req_id_to_index={name: at for at, name in enumerate(req_ids)})


class Meter:
    def __init__(self) -> None:
        self.begun: list[bool] = []

    def begin_step(self, is_verification: bool) -> None:
        self.begun.append(is_verification)


def runner_of(version: str, adapter: Any, output: Any) -> Any:
    """A runner of vLLM's shape, patched as the real one is."""

    class GPUModelRunner:
        def execute_model(self, scheduler_output: Any, *rest: Any, **options: Any) -> Any:
            return ("executed", scheduler_output, rest, options)

        def sample_tokens(self, grammar_output: Any) -> Any:
            return output

    install = {"V1": runners.install_v1, "V2": runners.install_v2}[version]
    install(SimpleNamespace(GPUModelRunner=GPUModelRunner))  # type: ignore[arg-type]
    runner = GPUModelRunner()
    setattr(runner, {"V1": "drafter", "V2": "speculator"}[version], adapter)
    return runner


def plan(drafts: dict[str, int], others: tuple[str, ...] = ()) -> Any:
    scheduled = {name: 1 + count for name, count in drafts.items()} | dict.fromkeys(others, 7)
    return SimpleNamespace(
        total_num_scheduled_tokens=sum(scheduled.values()),
        num_scheduled_tokens=scheduled,
        scheduled_spec_decode_tokens={name: [-1] * count for name, count in drafts.items()},
        scheduled_new_reqs=[],
        num_invalid_spec_tokens=None,
    )


@pytest.mark.parametrize(("version", "waiting"), [("V1", "_model_runner_output"), ("V2", "model_runner_output")])
def test_a_report_travels_with_the_output(version: str, waiting: str) -> None:
    report = StepReport(times=StepTimes(5, 3))
    of_step = output_of("a")
    late = SimpleNamespace(**{waiting: of_step})
    assert runner_of(version, SimpleNamespace(meter=Meter(), report=lambda: report), late).sample_tokens(None) is late
    assert runners.report_of(pickle.loads(pickle.dumps(of_step))) == report


@pytest.mark.parametrize("version", ["V1", "V2"])
def test_only_steps_of_verifications_alone_are_timed(version: str) -> None:
    meter = Meter()
    runner = runner_of(version, SimpleNamespace(meter=meter), None)
    for drafts, others in (({"a": 15, "b": 2}, ()), ({"a": 15}, ("b",)), ({}, ("b",))):
        step = plan(drafts, others)
        assert runner.execute_model(step, None) == ("executed", step, (None,), {})
    assert meter.begun == [True, False, False]
    runner.execute_model(plan({}))  # nothing to compute
    runner.execute_model(plan({"a": 1}), dummy_run=True)
    assert len(meter.begun) == 3


@pytest.mark.parametrize("adapter", [None, SimpleNamespace()], ids=["none", "vLLM's own"])
@pytest.mark.parametrize("version", ["V1", "V2"])
def test_other_engines_report_nothing(version: str, adapter: Any) -> None:
    of_step = output_of("a")
    runner = runner_of(version, adapter, of_step)
    runner.execute_model(plan({"a": 1}))
    assert runner.sample_tokens(None) is of_step
    assert runners.report_of(of_step) is None


def test_a_runner_without_speculation_has_no_drafter() -> None:
    runner = runner_of("V1", None, output_of("a"))
    del runner.drafter
    assert runners.report_of(runner.sample_tokens(None)) is None


def test_the_output_that_all_empty_steps_share_stays_empty() -> None:
    adapter = SimpleNamespace(meter=Meter(), report=lambda: StepReport())
    runner_of("V1", adapter, EMPTY_MODEL_RUNNER_OUTPUT).sample_tokens(None)
    assert runners.report_of(EMPTY_MODEL_RUNNER_OUTPUT) is None


def test_vllm_still_has_the_names() -> None:
    v1 = pytest.importorskip("vllm.v1.worker.gpu_model_runner")
    v2 = pytest.importorskip("vllm.v1.worker.gpu.model_runner")
    for module in (v1, v2):
        assert callable(module.GPUModelRunner.execute_model) and callable(module.GPUModelRunner.sample_tokens)
    assert callable(Scheduler.update_from_output)


# The wire.


def test_a_report_as_integers() -> None:
    report = StepReport(StepTimes(1500, 320), BudgetInForce(24, 4), None, Counter({Fallback.DOES_NOT_PAY: 3}))
    assert wire.encode(report) == [1500, 320, 24, 4, -1, 0, 0, 0, 0, 3, 0, 0]
    assert wire.encode(StepReport(prefill_schedule_interval=6)) == [-1, -1, -1, -1, 6] + [0] * NUM_REASONS
    assert wire.decode([]) is None


@given(
    times=st.none() | st.builds(StepTimes, st.integers(0, 10**9), st.integers(0, 10**9)),
    budget=st.none() | st.builds(BudgetInForce, st.integers(0, 4096), st.integers(0, 512)),
    counts=st.dictionaries(st.sampled_from(list(Fallback)), st.integers(1, 10**6)),
    interval=st.none() | st.integers(1, 64),
)
def test_there_and_back(times: Any, budget: Any, counts: dict[Fallback, int], interval: int | None) -> None:
    """Through vLLM's own encoding of its statistics."""
    report = StepReport(times, budget, None, Counter(counts), interval)
    stats = SpecDecodingStats.new(3)
    stats.num_draft_tokens_per_pos += wire.encode(report)
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(stats), type=SpecDecodingStats)
    assert wire.decode(sent.num_draft_tokens_per_pos[3:]) == report


def test_reports_add_up() -> None:
    first = StepReport(StepTimes(9, 9), BudgetInForce(3, 1), 1.5, Counter({Fallback.NO_GRAPH: 1}), 4)
    first.add(StepReport(None, BudgetInForce(8, 2), None, Counter({Fallback.NO_GRAPH: 1, Fallback.CHAIN_SAMPLING: 2})))
    counts = Counter({Fallback.NO_GRAPH: 2, Fallback.CHAIN_SAMPLING: 2})
    assert first == StepReport(StepTimes(9, 9), BudgetInForce(8, 2), 1.5, counts, 4)
    first.add(StepReport(prefill_schedule_interval=7))
    assert first.prefill_schedule_interval == 7


# The scheduler.


def engine_config(num_tree_nodes: int | None = None, is_auto: bool = False) -> Any:
    draft = SimpleNamespace(hf_config=SimpleNamespace())
    speculative: Any = SimpleNamespace(method="dflash", draft_model_config=draft, draft_tensor_parallel_size=1)
    drafter = DFlashConfig.from_dict(drafter_config(block_size=4), source="drafter")
    ownership.claim(speculative, drafter, None, num_tree_nodes, is_auto)
    return SimpleNamespace(speculative_config=speculative)


def stats_of(num_spec_tokens: int, *drafts: tuple[int, int]) -> SchedulerStats:
    """vLLM's own, of drafts of so many tokens of which so many were accepted."""
    drafted = SpecDecodingStats.new(num_spec_tokens) if drafts else None
    for count, accepted in drafts:
        assert drafted is not None
        drafted.observe_draft(count, accepted)
    return SchedulerStats(spec_decoding_stats=drafted, prefix_cache_stats=PrefixCacheStats())


def scheduler_of(config: Any, steps: list[SchedulerStats | None], log_stats: bool = True) -> Any:
    """A scheduler of vLLM's shape that answers so, patched as the real one is."""

    class FakeScheduler:
        def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
            stats = steps.pop(0)
            return {0: SimpleNamespace(scheduler_stats=None), 1: SimpleNamespace(scheduler_stats=stats)}

    scheduler.install(SimpleNamespace(Scheduler=FakeScheduler))  # type: ignore[arg-type]
    made: Any = FakeScheduler()
    made.vllm_config, made.log_stats, made.requests = config, log_stats, {}
    made.kv_cache_manager = KVCacheManager.__new__(KVCacheManager)
    made.kv_cache_manager.enable_caching = True
    return made


def reported(report: StepReport | None) -> Any:
    output = output_of("a", "b")
    if report is not None:
        setattr(output, runners._REPORT, report)
    return output


def test_drafts_by_position_of_chains_that_vllm_cut() -> None:
    stats = stats_of(4, (4, 2), (2, 2), (1, 0))
    made = scheduler_of(engine_config(), [stats])
    made.update_from_output(plan({"a": 4, "b": 2}), reported(StepReport(times=StepTimes(7, 5))))
    assert stats.spec_decoding_stats is not None
    assert stats.spec_decoding_stats.num_draft_tokens_per_pos == [3, 2, 1, 1, 7, 5, -1, -1, -1] + [0] * NUM_REASONS
    assert stats.spec_decoding_stats.num_accepted_tokens_per_pos == [2, 2, 0, 0]


@pytest.mark.parametrize(("is_bound", "expected"), [(False, 5), (True, 1)])
def test_the_schedulers_own_word(is_bound: bool, expected: int) -> None:
    """The interval at which it admits prompts: none, while more requests wait than can be admitted."""
    stats = stats_of(2, (2, 1))
    made = scheduler_of(engine_config(), [stats])
    setattr(made, prefill_cadence._STATE, PrefillCadence(5))
    made.prefill_capacity_bound = is_bound
    made.update_from_output(plan({"a": 2}), reported(StepReport()))
    assert stats.spec_decoding_stats is not None
    assert stats.spec_decoding_stats.num_draft_tokens_per_pos[2:] == [-1, -1, -1, -1, expected] + [0] * NUM_REASONS


@pytest.mark.parametrize(
    ("is_auto", "expected"),
    [(False, [2, 1, 1, 0, 0, 0]), (True, [2, 2, 2, 0, 0, 0])],
    ids=["of one size", "shared out"],
)
def test_positions_of_trees_are_depths(is_auto: bool, expected: list[int]) -> None:
    """Of six nodes, and a block of four rows: three depths."""
    stats = stats_of(6, (6, 3), (1, 1))
    made = scheduler_of(engine_config(6, is_auto), [stats])
    made.update_from_output(plan({"a": 6, "b": 1}), reported(StepReport()))
    assert stats.spec_decoding_stats is not None
    assert stats.spec_decoding_stats.num_draft_tokens_per_pos[:6] == expected


def test_fewer_nodes_than_planned() -> None:
    step = plan({"a": 5, "b": 5})
    made = scheduler_of(engine_config(6, is_auto=True), [stats_of(6, (2, 0))])
    made.update_from_output(step, reported(StepReport(budget=BudgetInForce(4, 2))))
    assert step.num_invalid_spec_tokens == {"a": 3, "b": 3}


def test_what_steps_without_drafts_report_waits() -> None:
    last = stats_of(2, (2, 1))
    made = scheduler_of(engine_config(), [stats_of(2), None, last])
    for _ in range(3):
        made.update_from_output(plan({}), reported(StepReport(fallbacks=Counter({Fallback.DOES_NOT_PAY: 1}))))
    assert last.spec_decoding_stats is not None
    assert last.spec_decoding_stats.num_draft_tokens_per_pos == [1, 1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 3, 0, 0]


def test_other_engines_and_switched_off_statistics_are_left_alone() -> None:
    stats = stats_of(2, (2, 1))
    made = scheduler_of(engine_config(), [stats, stats])
    made.update_from_output(plan({"a": 2}), reported(None))
    made.log_stats = False
    made.update_from_output(plan({"a": 2}), reported(StepReport()))
    assert stats.spec_decoding_stats is not None
    assert stats.spec_decoding_stats.num_draft_tokens_per_pos == [1, 1]
    assert not hasattr(made, scheduler._STATE)


# The log.


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(scheduler.logger, "warning", lambda text, *given: lines.append(text % given))
    return lines


def test_drafts_that_are_never_accepted_are_warned_of(warned: list[str]) -> None:
    now = [0.0]
    metrics = scheduler.SchedulerMetrics(engine_config(), lambda: now[0])
    for _ in range(30):
        now[0] += 3.0
        metrics.add(StepReport(), stats_of(2, *[(2, 0)] * 100))
    assert len(warned) == 1
    assert warned[0].startswith("vllm_dflash: acceptance length 1.00 over the last 2000 drafts (60 s) is below 1.25: ")


def test_steps_that_verify_nothing_are_not_warned_of(warned: list[str]) -> None:
    """With "tree": "auto" vLLM plans drafts, and counts them, while none pays."""
    now = [0.0]
    metrics = scheduler.SchedulerMetrics(engine_config(6, is_auto=True), lambda: now[0])
    for _ in range(30):
        now[0] += 3.0
        stats = stats_of(6, *[(0, 0)] * 100)
        metrics.add(StepReport(budget=BudgetInForce(0, 100)), stats)
        assert stats.spec_decoding_stats is not None and stats.spec_decoding_stats.num_drafts == 100
        assert stats.spec_decoding_stats.num_draft_tokens_per_pos[:6] == [0] * 6
    assert warned == []


def test_drafts_between_steps_that_verify_nothing_are_judged_alone(warned: list[str]) -> None:
    """One accepted token a draft is enough; over five times as many drafts it would be 1.20."""
    now = [0.0]
    metrics = scheduler.SchedulerMetrics(engine_config(6, is_auto=True), lambda: now[0])
    for _ in range(100):
        now[0] += 3.0
        metrics.add(StepReport(budget=BudgetInForce(400, 100)), stats_of(6, *[(4, 1)] * 100))
        for _ in range(4):
            metrics.add(StepReport(budget=BudgetInForce(0, 100)), stats_of(6, *[(0, 0)] * 100))
    assert warned == []


def request_of(*block_hashes: str, skips: bool = False) -> Any:
    """vLLM's own, of a prompt with such blocks."""
    sampling = SamplingParams(max_tokens=8, skip_reading_prefix_cache=skips)
    hasher: Any = lambda request: list(block_hashes)  # noqa: E731
    return Request("a", [1, 2, 3], sampling, None, block_hasher=hasher)


def schedule_prompts(requests: dict[str, Any], hits: int, enable_caching: bool = True) -> None:
    """70 steps in which these are new and one lookup is counted, and a request that is over by then."""
    stats = PrefixCacheStats(requests=1, queries=100, hits=hits)
    made = scheduler_of(engine_config(), [SchedulerStats(prefix_cache_stats=stats)] * 70)
    made.requests, made.kv_cache_manager.enable_caching = requests, enable_caching
    step = plan({})
    step.scheduled_new_reqs = [SimpleNamespace(req_id=name) for name in (*requests, "over")]
    for _ in range(70):
        made.update_from_output(step, reported(StepReport()))


@pytest.mark.parametrize("hits", [0, 64])
def test_a_prefix_cache_that_finds_nothing_is_warned_of(warned: list[str], hits: int) -> None:
    schedule_prompts({"a": request_of("first", "second"), "b": request_of()}, hits)
    expected = "vllm_dflash: the prefix cache found 0 of the 6500 tokens of the last 65 prompts, although 64 of them"
    assert [line[: len(expected)] for line in warned] == ([] if hits else [expected])


def test_prompts_of_preempted_requests_are_no_repeats(warned: list[str]) -> None:
    """vLLM's statistics have their lookups apart."""
    request = request_of("first", "second")
    request.num_preemptions = 1
    schedule_prompts({"a": request}, hits=0)
    assert warned == []


def test_prompts_that_are_not_looked_up_are_no_repeats(warned: list[str]) -> None:
    """Such as those whose log probabilities were asked for; or with caching off, where a connector needs the hashes."""
    schedule_prompts({"a": request_of("first", "second", skips=True)}, hits=0)
    schedule_prompts({"a": request_of("first", "second")}, hits=0, enable_caching=False)
    assert warned == []
