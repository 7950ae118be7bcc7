# SPDX-License-Identifier: Apache-2.0
"""Which cores an engine computes on: the same for all engines of a round, so that a slow core slows them all.

That is, one that is slow for longer than a round takes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path


def core_groups(size: int) -> list[list[int]]:
    """This process's cores, so many at a time; what is left over is nobody's. Raises ValueError."""
    cores = sorted(os.sched_getaffinity(0))
    if not 0 < size <= len(cores):
        raise ValueError(f"{size} cores of {len(cores)}")
    return [cores[start : start + size] for start in range(0, len(cores) - size + 1, size)]


def keep_to(cores: Collection[int]) -> None:
    """Let all threads of this process run on these only. Those that it starts later follow."""
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread.name), cores)
