# SPDX-License-Identifier: Apache-2.0
"""Timing of steps: by the host's clock, and by events that nobody waits for."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
import torch

from vllm_dflash.compat.metrics.fallbacks import Fallback
from vllm_dflash.compat.metrics.meter import SAMPLE_STEPS, EventTimer, StepMeter, WallTimer
from vllm_dflash.compat.metrics.report import BudgetInForce, StepReport, StepTimes


class Device:
    """A stream that is `delay` events behind the host, and a clock that ticks with every event."""

    def __init__(self) -> None:
        self.recorded: list[Event] = []
        self.num_done = 0


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.place = device, -1

    def record(self) -> None:
        self.place = len(self.device.recorded)
        self.device.recorded.append(self)

    def query(self) -> bool:
        return self.place < self.device.num_done

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds: the square of an event's place."""
        assert self.query() and end.query(), "asked before the device was there: that would be an error"
        return float(end.place**2 - self.place**2)


def run_step(meter: StepMeter, is_verification: bool = True, drafts: bool = True) -> StepReport:
    meter.begin_step(is_verification)
    meter.begin_draft()
    meter.end_draft(drafts)
    return meter.report(None, None)


def test_the_hosts_clock() -> None:
    now = iter([10.0, 10.004, 10.005, 20.0])
    meter = StepMeter(WallTimer(lambda: next(now)))
    assert run_step(meter, is_verification=False).times is None
    assert run_step(meter).times == StepTimes(4000, 1000)
    assert meter.report(None, None).times is None


def test_a_step_that_drafts_nothing_has_no_times() -> None:
    now = iter([1.0, 2.0, 5.0, 6.0, 8.0])
    meter = StepMeter(WallTimer(lambda: next(now)))
    assert run_step(meter, drafts=False).times is None
    assert run_step(meter).times == StepTimes(1_000_000, 2_000_000)


def test_events_are_read_when_the_device_has_passed_them() -> None:
    device = Device()
    meter = StepMeter(EventTimer(lambda: Event(device)))
    assert run_step(meter).times is None
    device.num_done = 2
    assert run_step(meter).times is None
    assert len(device.recorded) == 3, "a step was timed before the one before was read"
    device.num_done = 3
    assert run_step(meter).times == StepTimes(1000, 3000)  # places 0, 1 and 2: 1 ms and 3 ms


def test_one_step_of_many_is_timed() -> None:
    device = Device()
    meter = StepMeter(EventTimer(lambda: Event(device)))
    timed = []
    for _ in range(4 * SAMPLE_STEPS):
        device.num_done = len(device.recorded)
        before = device.num_done
        run_step(meter)
        timed.append(len(device.recorded) > before)
    assert timed.count(True) <= 4
    first, second = (place for place, was in enumerate(timed) if was).__next__, timed.index(True, 1)
    assert first() == 0 and second >= SAMPLE_STEPS


def test_an_unfinished_step_is_forgotten() -> None:
    device = Device()
    meter = StepMeter(EventTimer(lambda: Event(device)))
    meter.begin_step(True)  # fails on its way
    run_step(meter, drafts=False)
    assert len(device.recorded) == 3
    run_step(meter)
    device.num_done = len(device.recorded)
    assert meter.report(None, None).times == StepTimes(7000, 9000)  # places 3, 4 and 5


def test_steps_made_up_between_real_ones_are_not_timed() -> None:
    now = iter([1.0, 2.0, 3.0])
    meter = StepMeter(WallTimer(lambda: next(now)))
    assert run_step(meter).times == StepTimes(1_000_000, 1_000_000)
    meter.begin_draft()
    meter.end_draft()
    assert meter.report(None, None).times is None


def test_counts_are_reported_once() -> None:
    meter = StepMeter.on(torch.device("cpu"))
    meter.count(Fallback.NO_GRAPH)
    meter.count(Fallback.NO_GRAPH)
    budget = BudgetInForce(6, 2)
    assert meter.report(budget, 1.5) == StepReport(None, budget, 1.5, Counter({Fallback.NO_GRAPH: 2}))
    assert meter.report(None, None) == StepReport()


@pytest.mark.gpu
def test_events_of_a_real_stream() -> None:
    """A device that sleeps twice as long before its drafting as in it."""
    torch.cuda._sleep(1)  # a kernel's first launch loads it, which takes the host longer than the device sleeps
    torch.cuda.synchronize()
    meter = StepMeter.on(torch.device("cuda"))
    meter.begin_step(True)
    torch.cuda._sleep(40_000_000)
    meter.begin_draft()
    torch.cuda._sleep(20_000_000)
    meter.end_draft()
    assert meter.report(None, None).times is None, "the host has waited for the device"
    torch.cuda.synchronize()
    times = meter.report(None, None).times
    assert times is not None
    assert times.verify_us == pytest.approx(2 * times.draft_us, rel=0.2)


# What the adapter and the trees count.


@pytest.mark.parametrize(
    ("drafts", "has_graph", "has_graphs", "budget", "expected"),
    [
        (True, True, True, None, []),
        (True, False, True, None, [Fallback.NO_GRAPH]),
        (True, False, False, None, []),
        (False, True, True, True, []),  # vLLM's schedule by batch size says so
        (False, False, True, False, [Fallback.DOES_NOT_PAY]),
    ],
)
def test_steps_that_the_v2_adapter_counts(
    drafts: bool, has_graph: bool, has_graphs: bool, budget: bool | None, expected: list[Fallback]
) -> None:
    runner_v2 = pytest.importorskip("vllm_dflash.compat.runner_v2")
    meter = StepMeter.on(torch.device("cpu"))
    adapter = SimpleNamespace(
        meter=meter,
        graphs=SimpleNamespace(needs_capture=lambda: has_graphs),
        budget=None if budget is None else SimpleNamespace(drafts=budget),
    )
    runner_v2.V2Adapter._count(adapter, drafts, has_graph=has_graph)
    assert list(meter.report(None, None).fallbacks.elements()) == expected


def test_requests_that_run_as_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    from vllm_dflash.compat.trees.model_state import TreeModelState

    monkeypatch.setattr(DefaultModelState, "add_request", lambda *given: None)
    begun: list[tuple[int, bool]] = []
    state: Any = TreeModelState.__new__(TreeModelState)
    state.trees = SimpleNamespace(begin=lambda index, as_chain: begun.append((index, as_chain)))
    state.meter = StepMeter.on(torch.device("cpu"))
    plain, looks_back = SamplingParams(), SamplingParams(repetition_penalty=1.2)
    for index, (all_as_chain, params) in enumerate(((False, plain), (False, looks_back), (True, plain))):
        state.all_as_chain = all_as_chain
        state.add_request(index, SimpleNamespace(sampling_params=params))
    assert begun == [(0, False), (1, True), (2, True)]
    counts = Counter({Fallback.CHAIN_SAMPLING: 1, Fallback.CHAIN_LOGITS_PROCESSOR: 1})
    assert state.meter.report(None, None).fallbacks == counts
