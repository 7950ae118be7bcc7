# SPDX-License-Identifier: Apache-2.0
"""The child's side of an engine in a process of its own: start what the parent's job says."""

from __future__ import annotations

import ctypes
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

from gpu.engine_inside import engine_facts
from gpu.names import Record


def start_engine(connection: Connection) -> tuple[Any, Record]:
    """Take the job, start its engine and tell what came up; returns the engine and the job."""
    die_with_parent()
    job = connection.recv()
    started = time.perf_counter()
    llm = start_llm(job)
    connection.send(engine_facts(llm) | {"seconds": round(time.perf_counter() - started, 1)})
    return llm, job


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def start_llm(job: Record) -> Any:
    """An `LLM` of job["llm"]; with a job["seed"], dummy weights are plausible ones."""
    if job["llm"].get("load_format") == "dummy" and "seed" in job:
        use_plausible_weights(job["seed"])
    from vllm import LLM

    return LLM(**job["llm"])


def use_plausible_weights(seed: int) -> None:
    """Let vLLM's dummy loader draw matrices from N(0, 0.02) and set vectors to one.

    Its own dummy weights are so small that every activation is near zero, and a card that multiplies zeros draws less
    power and clocks higher than it does at work.
    """
    import torch
    from vllm.model_executor.model_loader import dummy_loader

    state = {"seed": seed}

    def fill(tensor: torch.Tensor, *_: Any, **__: Any) -> None:
        if tensor.device.type == "meta" or not torch.is_floating_point(tensor):
            return
        if tensor.dim() < 2:
            tensor.data.fill_(1.0)
            return
        state["seed"] += 1
        generator = torch.Generator(device=tensor.device).manual_seed(state["seed"])
        tensor.data.normal_(0.0, 0.02, generator=generator)

    dummy_loader.initialize_single_dummy_weight = fill
