# SPDX-License-Identifier: Apache-2.0
"""What an engine has in use between loads, and what of it did not come back."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

from gpu.engine_inside import model_runner
from gpu.names import Record

MIB = 2**20


def in_use(llm: Any) -> Record:
    gc.collect()
    engine = llm.llm_engine
    allocated, reserved = gpu_mib()
    return {
        "unfinished": engine.get_num_unfinished_requests(),
        "scheduler_requests": len(engine.engine_core.engine_core.scheduler.requests),
        "output_requests": len(engine.output_processor.request_states),
        "runner_requests": runner_requests(model_runner(llm)),
        "free_blocks": free_blocks(llm),
        "gpu_allocated_mib": allocated,
        "gpu_reserved_mib": reserved,
        "rss_mib": rss_mib(),
    }


def free_blocks(llm: Any) -> int:
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def runner_requests(runner: Any) -> int:
    """Requests that the model runner keeps state for: the V2 runner's table, or the V1 runner's dict."""
    table = getattr(runner, "req_states", None)
    return len(table.req_id_to_index if table is not None else runner.requests)


def rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / MIB, 1)


def gpu_mib() -> tuple[float, float]:
    """Allocated and reserved by this process; zeros without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0.0, 0.0
    torch.cuda.synchronize()
    return round(torch.cuda.memory_allocated() / MIB, 2), round(torch.cuda.memory_reserved() / MIB, 2)


def leaks(end: Record, allowed_mib: float) -> list[str]:
    """What did not come back."""
    if not end:
        return ["the load did not run to its end"]
    before, after, found = end["before"], end["after"], []
    for name in ("unfinished", "scheduler_requests", "output_requests"):
        if after[name]:
            found.append(f"{name}: {after[name]} at the end")
    if after["runner_requests"] > 1:  # the runner hears of the very last one's end with the next step only
        found.append(f"runner_requests: {after['runner_requests']} at the end")
    if after["free_blocks"] != before["free_blocks"]:
        found.append(f"free_blocks: {before['free_blocks']} at the start, {after['free_blocks']} at the end")
    if after["gpu_allocated_mib"] - before["gpu_allocated_mib"] > allowed_mib:
        found.append(f"GPU memory: {before['gpu_allocated_mib']} MiB warm, {after['gpu_allocated_mib']} at the end")
    return found
