# SPDX-License-Identifier: Apache-2.0
"""In the worker: how long a step verifies and drafts, and which fall-backs it took.

On a CPU time is the host's clock. On a GPU the host runs ahead of the device, so that only the device knows: three
events of every 16th step, read by a later one once they are over. Nobody waits for them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import torch

from vllm_dflash.compat.metrics.fallbacks import Fallback
from vllm_dflash.compat.metrics.report import BudgetInForce, StepReport, StepTimes

#: Steps from one that is timed on a GPU to the next, at least.
SAMPLE_STEPS = 16


class StepTimer(Protocol):
    """Told where a step is; says how long an earlier one took, once."""

    def start(self) -> None:
        """The step begins."""

    def start_draft(self) -> None:
        """It has verified, and begins to draft."""

    def end_draft(self) -> None:
        """It has drafted."""

    def cancel(self) -> None:
        """It drafts nothing, or is none to be timed after all."""

    def take(self) -> StepTimes | None:
        """Times of a step that is over and has not been taken yet."""


class WallTimer:
    """Of a device that computes while the host waits."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._marks: list[float] = []

    def start(self) -> None:
        self._marks = [self._clock()]

    def start_draft(self) -> None:
        self._marks.append(self._clock())

    def end_draft(self) -> None:
        self._marks.append(self._clock())

    def cancel(self) -> None:
        self._marks = []

    def take(self) -> StepTimes | None:
        if len(self._marks) < 3:
            return None
        start, drafting, end = self._marks
        self._marks = []
        return StepTimes(round(1e6 * (drafting - start)), round(1e6 * (end - drafting)))


class EventTimer:
    """Of a GPU: events in the stream, one step of many."""

    def __init__(self, make_event: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True)) -> None:
        self._events = [make_event() for _ in range(3)]
        self._num_recorded = 0  # of the step that is timed; 3: it waits to be read
        self._until_next = 0

    def start(self) -> None:
        if self._num_recorded == 3:  # the device has not come to its end yet, or nobody has asked
            return
        self._num_recorded = 0
        self._until_next -= 1
        if self._until_next < 0:
            self._record(0)

    def start_draft(self) -> None:
        self._record(1)

    def end_draft(self) -> None:
        self._record(2)

    def cancel(self) -> None:
        if self._num_recorded < 3:
            self._num_recorded = 0

    def take(self) -> StepTimes | None:
        start, drafting, end = self._events
        if self._num_recorded < 3 or not end.query():
            return None
        self._num_recorded, self._until_next = 0, SAMPLE_STEPS - 1
        return StepTimes(round(1e3 * start.elapsed_time(drafting)), round(1e3 * drafting.elapsed_time(end)))

    def _record(self, place: int) -> None:
        if self._num_recorded == place:
            self._events[place].record()
            self._num_recorded += 1


class StepMeter:
    """What an adapter and its trees tell of their steps."""

    def __init__(self, timer: StepTimer) -> None:
        self._timer = timer
        self._is_timed = False
        self._fallbacks: Counter[Fallback] = Counter()

    @classmethod
    def on(cls, device: torch.device) -> StepMeter:
        """For steps on this device."""
        return cls(EventTimer() if device.type == "cuda" else WallTimer())

    def count(self, reason: Fallback) -> None:
        """One more fall-back."""
        self._fallbacks[reason] += 1

    def begin_step(self, is_verification: bool) -> None:
        """The runner begins; `is_verification`: every request of the batch verifies drafts. Others are not timed."""
        self._is_timed = is_verification
        if is_verification:
            self._timer.start()

    def begin_draft(self) -> None:
        """The adapter begins."""
        if self._is_timed:
            self._timer.start_draft()

    def end_draft(self, has_drafted: bool = True) -> None:
        """It has launched, or done, all there was to do."""
        if self._is_timed:
            if has_drafted:
                self._timer.end_draft()
            else:
                self._timer.cancel()
        self._is_timed = False  # steps made up in between are none

    def report(self, budget: BudgetInForce | None, break_even: float | None) -> StepReport:
        """What has not been reported yet."""
        fallbacks, self._fallbacks = self._fallbacks, Counter()
        return StepReport(self._timer.take(), budget, break_even, fallbacks)
