# SPDX-License-Identifier: Apache-2.0
"""What steps take beyond their measured parts, seen while serving.

With async scheduling the host prepares a step while the device computes the one before, so the slower of the two sets
the pace: on a small target the host. Whose turn it is shows where the host meets the device: does it wait?

A host has more to do for more requests. So what was seen counts for batches of about as many alone, and a load that
falls leaves nothing behind.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

_REMEMBERED = 32  # steps; the median counts, so that a hiccup does not
_WAITED_MS = 0.02

#: Without drafting and with it.
Pair = tuple[float, float]


@dataclass
class _Step:
    """One step, as far as it is known. One that nobody notes, a prompt's, does not count."""

    start: float
    level: int  # of its requests
    gpu_ms: float | None = None  # measured parts
    drafts: bool = False
    waited_ms: float | None = None


def _level(num_reqs: int) -> int:
    """Batches of the same level differ by less than a factor of two."""
    return num_reqs.bit_length()


class _Seen:
    """The last values without drafting and with it, by level."""

    def __init__(self) -> None:
        self._ms: dict[tuple[int, bool], deque[float]] = defaultdict(partial(deque, maxlen=_REMEMBERED))

    def note(self, step: _Step, ms: float) -> None:
        self._ms[step.level, step.drafts].append(ms)

    def medians(self, level: int) -> Pair:
        """At least 0. What has not been seen yet is taken to be as the other."""
        kinds = ((drafts, self._ms.get((level, drafts))) for drafts in (False, True))
        found = {drafts: max(0.0, statistics.median(seen)) for drafts, seen in kinds if seen}
        either = min(found.values(), default=0.0)
        return found.get(False, either), found.get(True, either)


class Overhead:
    """Milliseconds from one step's start to the next one's, taken apart."""

    def __init__(self, overlaps: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        self.overlaps, self._clock = overlaps, clock
        self._device, self._host = _Seen(), _Seen()
        self._before: _Step | None = None
        self._step: _Step | None = None

    def begin_step(self, num_reqs: int) -> None:
        """The next step begins, so the one before has ended."""
        now, step, before = self._clock(), self._step, self._before
        if step is not None and step.gpu_ms is not None:
            took_ms = 1e3 * (now - step.start)
            if not self.overlaps:
                self._device.note(step, took_ms - step.gpu_ms)
            elif step.waited_ms is not None:
                self._host.note(step, took_ms - step.waited_ms)
                if step.waited_ms > _WAITED_MS and before is not None and before.gpu_ms is not None:
                    self._device.note(before, took_ms - before.gpu_ms)
        self._before, self._step = step, _Step(now, _level(num_reqs))

    def forget(self) -> None:
        """Something else has come after the last step: what ends, or is waited for, from here on is not its part."""
        self._before = self._step = None

    def note(self, gpu_ms: float, drafts: bool) -> None:
        """What of this step is known."""
        assert self._step is not None
        self._step.gpu_ms, self._step.drafts = gpu_ms, drafts

    def waited(self, ms: float | None) -> None:
        """In this step the host has waited so long for the device to end the one before; None: nobody has looked."""
        if self._step is not None:
            self._step.waited_ms = ms

    def ms(self, num_reqs: int) -> tuple[Pair, Pair]:
        """Of batches of about so many: what comes to the device's measured parts, and what the host takes itself."""
        level = _level(num_reqs)
        return self._device.medians(level), self._host.medians(level)
