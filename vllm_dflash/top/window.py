# SPDX-License-Identifier: Apache-2.0
"""What has happened lately: the difference of two snapshots. Pure arithmetic."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from vllm_dflash.top.snapshot import Counters, Snapshot

#: "Now" is so many seconds, or one interval where that is longer.
WINDOW_SECONDS = 10.0


@dataclass(frozen=True)
class Lately:
    """The last seconds; `seconds` = 0 while there is nothing to compare with."""

    seconds: float
    counters: Counters

    def per_second(self, count: float) -> float | None:
        """A rate; None while there is nothing to compare with."""
        return count / self.seconds if self.seconds > 0 else None


class Window:
    """The snapshots of the last seconds."""

    def __init__(self) -> None:
        self._snapshots: deque[Snapshot] = deque()
        self.num_restarts = 0

    def add(self, snapshot: Snapshot) -> None:
        """One more. If the server was restarted, what was before counts no longer."""
        kept = self._snapshots
        if kept and _is_another(kept[-1], snapshot):
            kept.clear()
            self.num_restarts += 1
        kept.append(snapshot)
        while len(kept) > 2 and kept[1].at <= snapshot.at - WINDOW_SECONDS:
            kept.popleft()

    def lately(self) -> Lately:
        """From the oldest to the newest."""
        first, last = self._snapshots[0], self._snapshots[-1]
        return Lately(last.at - first.at, last.counters - first.counters)


def _is_another(before: Snapshot, now: Snapshot) -> bool:
    """Whether a server was restarted: it says so, or a counter has fallen. Several API servers say no start."""
    return now.started != before.started or now.counters.is_behind(before.counters)
