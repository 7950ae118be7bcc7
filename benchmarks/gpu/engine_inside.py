# SPDX-License-Identifier: Apache-2.0
"""Looking into vLLM's engine: its model runner, its drafter, its counters."""

from __future__ import annotations

from typing import Any

from gpu.names import Record


def model_runner(llm: Any) -> Any:
    """Of an engine of one GPU, whose worker is in this process."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    return getattr(worker, "worker", worker).model_runner


def drafter_of(runner: Any) -> Any:
    """The V2 runner's speculator or the V1 runner's drafter; None without speculation."""
    return getattr(runner, "speculator", None) or getattr(runner, "drafter", None)


def engine_facts(llm: Any) -> Record:
    config = llm.llm_engine.vllm_config
    first, *others = llm.collective_rpc(worker_facts)
    if any(other != first for other in others):
        raise RuntimeError(f"the ranks' workers are unlike: {[first, *others]}")
    return first | {
        "runner": "V2" if config.use_v2_model_runner else "V1",
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode).split(".")[-1],
        "capture_sizes": config.compilation_config.cudagraph_capture_sizes or [],
        "kv_cache_tokens": (config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size,
    }


def worker_facts(worker: Any) -> Record:
    """What one rank drafts and attends with."""
    runner = getattr(worker, "worker", worker).model_runner
    drafter = type(drafter_of(runner)) if drafter_of(runner) is not None else None
    groups = [group for groups in getattr(runner, "attn_groups", []) for group in groups]
    return {
        "drafter": f"{drafter.__module__}.{drafter.__qualname__}" if drafter else None,
        "attention": "+".join(sorted({group.backend.get_name() for group in groups})) or "unknown attention",
    }


def read_counters(llm: Any) -> tuple[int, int]:
    from vllm_dflash.benchmark.offline import acceptance_counts

    counts = acceptance_counts(llm)
    return counts.drafts, counts.accepted_tokens
