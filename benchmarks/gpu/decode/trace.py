# SPDX-License-Identifier: Apache-2.0
"""Where the time of a step goes: a torch profile, GPU time by kernel and by part, and a table of it."""

from __future__ import annotations

import bisect
import gzip
import json
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from gpu.decode.batch import PROFILED_STEPS, SKIPPED_STEPS
from gpu.engine_inside import drafter_of, model_runner
from gpu.names import Record


class Trace:
    """A torch profile of some steps of the steady region. What the drafter launches is told by a range around it."""

    def __init__(self, llm: Any, file: str) -> None:
        import torch

        self.file, self.seen, self.seconds = file, 0, 0.0
        self.cuda = torch.cuda
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        self.profiler = torch.profiler.profile(activities=activities)
        self._mark(drafter_of(model_runner(llm)))

    def _mark(self, drafter: Any) -> None:
        from torch.profiler import record_function

        if drafter is None or "propose" in vars(drafter):  # marked by an earlier trace
            return
        propose = drafter.propose

        def marked(*args: Any, **kwargs: Any) -> Any:
            with record_function("draft"):
                return propose(*args, **kwargs)

        drafter.propose = marked

    def step(self) -> None:
        """Called after every step of the steady region."""
        self.seen += 1
        if self.seen == SKIPPED_STEPS:
            self.cuda.synchronize()
            self.profiler.start()
            self.seconds = -time.perf_counter()
        elif self.seen == SKIPPED_STEPS + PROFILED_STEPS:
            self.cuda.synchronize()
            self.seconds += time.perf_counter()
            self.profiler.stop()

    def summary(self) -> Record:
        if self.seen < SKIPPED_STEPS + PROFILED_STEPS:
            raise RuntimeError(f"only {self.seen} steps to trace")
        self.profiler.export_chrome_trace(self.file)
        with gzip.open(self.file, "rt") as lines:
            events = json.load(lines)["traceEvents"]
        return kernel_times(events, PROFILED_STEPS) | {"wall_ms": 1000 * self.seconds / PROFILED_STEPS}


def kernel_times(events: Iterable[Record], steps: int) -> Record:
    """GPU milliseconds a step by kernel and by part: the draft's CUDA graph, the rest of drafting, everything else."""
    gpu, launches, ranges = [], {}, []
    for event in events:
        kind = event.get("cat")
        if kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            gpu.append(event)
        elif kind in ("cuda_runtime", "cuda_driver"):
            launches[event.get("args", {}).get("correlation")] = event
        elif kind == "user_annotation" and event["name"] == "draft":
            ranges.append((event["ts"], event["ts"] + event["dur"]))
    ranges.sort()
    kernels: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    parts: dict[str, float] = defaultdict(float)
    for event in gpu:
        part = part_of(launches.get(event["args"].get("correlation")), ranges)
        kernels[event["name"]][part] += event["dur"] / 1000 / steps
        parts[part] += event["dur"] / 1000 / steps
    busy = union_length((e["ts"], e["ts"] + e["dur"]) for e in gpu) / 1000 / steps
    return {"kernels": {name: dict(times) for name, times in kernels.items()}, "parts": dict(parts), "busy_ms": busy}


def part_of(launch: Record | None, ranges: list[tuple[float, float]]) -> str:
    if launch is None:
        return "unknown"
    index = bisect.bisect_right(ranges, (launch["ts"], float("inf"))) - 1
    drafting = index >= 0 and launch["ts"] <= ranges[index][1]
    graph = "GraphLaunch" in launch["name"]
    return ("draft graph" if graph else "draft, other") if drafting else ("verify graph" if graph else "other")


def union_length(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of what the intervals cover together."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def profile_table(profile: Record) -> str:
    """The 40 costliest kernels, GPU ms a step."""
    parts = sorted(profile["parts"], key=lambda part: -profile["parts"][part])
    where = f"{profile['engine']}, {profile['requests']} requests, {profile['context']} tokens in"
    busy = f"GPU busy {profile['busy_ms']:.3f} ms of {profile['wall_ms']:.3f} ms a traced step"
    lines = [
        f"{where}: {busy} ({profile['trace']})",
        "total".rjust(9) + "".join(part.rjust(14) for part in parts) + "  kernel",
    ]
    rows = sorted(profile["kernels"].items(), key=lambda item: -sum(item[1].values()))
    for name, times in [("(all)", profile["parts"]), *rows[:40]]:
        cells = "".join(f"{times[part]:14.4f}" if part in times else " " * 14 for part in parts)
        lines.append(f"{sum(times.values()):9.4f}{cells}  {name[:110]}")
    return "\n".join(lines)
