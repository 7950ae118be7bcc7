# SPDX-License-Identifier: Apache-2.0
"""What steps take beyond their measured parts: sampling, gaps, and on a small target the host's own work."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

_REMEMBERED = 32  # steps; the median counts, so that a pause between requests does not


class Overhead:
    """Of steps with drafting and without it. Seconds from one step's start to the next one's."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._excess_ms: dict[bool, deque[float]] = {drafts: deque(maxlen=_REMEMBERED) for drafts in (False, True)}
        self._last: tuple[float, float | None, bool] | None = None  # start, measured parts in ms, whether it drafts

    def begin_step(self) -> None:
        """The next step begins, so the one before has ended."""
        now = self._clock()
        if self._last is not None:
            start, gpu_ms, drafts = self._last
            if gpu_ms is not None:
                self._excess_ms[drafts].append(1e3 * (now - start) - gpu_ms)
        self._last = (now, None, False)

    def note(self, gpu_ms: float, drafts: bool) -> None:
        """What of this step is known. A step that nobody notes, a prompt's, does not count."""
        assert self._last is not None
        self._last = (self._last[0], gpu_ms, drafts)

    def ms(self) -> tuple[float, float]:
        """Without drafting and with it. What has not been seen yet is taken to be as the other."""
        found = {drafts: max(0.0, statistics.median(seen)) for drafts, seen in self._excess_ms.items() if seen}
        either = min(found.values(), default=0.0)
        return found.get(False, either), found.get(True, either)
