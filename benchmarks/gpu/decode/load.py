# SPDX-License-Identifier: Apache-2.0
"""Requests that come and go: so many users, each of whom asks again a little after an answer is complete."""

from __future__ import annotations

import heapq
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

from gpu.decode.batch import exactly
from gpu.names import Record

THINK_SECONDS = 0.02  # mean of an exponential distribution
RAMP = 0.3  # of the time, in which nothing is counted


@dataclass(frozen=True)
class Load:
    """What is asked of an engine."""

    users: int
    seconds: float
    shortest: int  # output tokens; lengths are uniform between these
    longest: int
    temperature: float
    seed: int


def run_load(llm: Any, prompts: list[list[int]], load: Load) -> Record:
    """Serve the load for its time: tokens/s, what a step took, and how many requests ran, all after the ramp."""
    engine, rng = llm.llm_engine, random.Random(load.seed)
    begun = time.perf_counter()
    # Users begin spread over half of the ramp: (when one asks, which of their requests it is).
    asking = [(begun + RAMP * load.seconds / 2 * user / load.users, user) for user in range(load.users)]
    heapq.heapify(asking)
    running: dict[str, int] = {}
    steps: list[tuple[float, int, int]] = []  # when, tokens, requests that ran
    number = 0
    while (now := time.perf_counter()) < begun + load.seconds:
        while asking and asking[0][0] <= now:
            _, user = heapq.heappop(asking)
            name, number = f"load-{load.seed}-{number}", number + 1
            sampling = exactly(rng.randint(load.shortest, load.longest), load.temperature)
            engine.add_request(name, {"prompt_token_ids": prompts[number % len(prompts)]}, sampling)
            running[name] = user
        if not running:
            time.sleep(max(0.0, asking[0][0] - time.perf_counter()))
            continue
        outputs = engine.step()
        now = time.perf_counter()
        steps.append((now, sum(len(output.outputs[0].token_ids) for output in outputs), len(running)))
        for output in outputs:
            if output.finished:
                user = running.pop(output.request_id)
                heapq.heappush(asking, (now + rng.expovariate(1 / THINK_SECONDS), user))
    engine.abort_request(list(running))
    while engine.has_unfinished_requests():
        engine.step()
    return measured([step for step in steps if step[0] >= begun + RAMP * load.seconds])


def measured(steps: list[tuple[float, int, int]]) -> Record:
    """The figures of these steps, the first of which only begins the time."""
    if len(steps) < 3:
        return {
            "ms_step": float("nan"),
            "tokens_s": float("nan"),
            "running": 0.0,
            "length": float("nan"),
            "steady": False,
        }
    seconds, tokens = steps[-1][0] - steps[0][0], sum(count for _, count, _ in steps[1:])
    running = statistics.mean(count for _, _, count in steps[1:])
    return {
        "ms_step": 1000 * seconds / (len(steps) - 1),
        "tokens_s": tokens / seconds,
        "running": running,
        "length": tokens / (len(steps) - 1) / running,
        "steady": True,
    }
