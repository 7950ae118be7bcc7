# SPDX-License-Identifier: Apache-2.0
"""Runs on vLLM's `LLM(...)`, one engine child after the other: no speculation, vLLM's own dflash, this plugin's."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from vllm_dflash.benchmark.engine_process import EngineFailedError, engine_child, engine_environment, receive
from vllm_dflash.benchmark.job import LoadFinished, LoadJob, Ready
from vllm_dflash.benchmark.notes import with_notes
from vllm_dflash.benchmark.records import RequestRecord, Run
from vllm_dflash.benchmark.sets.conversations import PromptSet

CHILD = (sys.executable, "-m", "vllm_dflash.benchmark.offline_load")
PLAIN, VLLM_OWN, OURS = "no speculation", "vLLM's own dflash", "vllm_dflash"
SYSTEMS = {"plain": PLAIN, "vllm": VLLM_OWN, "vllm_dflash": OURS}
#: Who drafts is decided by this variable, which every process of vLLM inherits.
SWITCH = {OURS: {"VLLM_DFLASH": "1"}, VLLM_OWN: {"VLLM_DFLASH": "0"}, PLAIN: {"VLLM_DFLASH": "0"}}

#: How long an engine's start may take: a large model may come from the hub first.
START_S = 3600.0
#: How much longer than `--timeout` an engine may say nothing: it looks at the time between its steps.
SLACK_S = 120.0

OnStart = Callable[[str, str, int, int], None]


def run_offline(
    job: LoadJob,
    systems: Sequence[str],
    prompt_sets: Sequence[PromptSet],
    concurrencies: Sequence[int],
    logs: Path,
    on_start: OnStart,
    on_record: Callable[[RequestRecord], None],
) -> Generator[Run, None, None]:
    """A run for each system, prompt set and concurrency. Ctrl-C gives what there is of the run under way, and ends.

    job: with its loads left empty. Raises EngineFailedError, after what there is of the run under way, if an engine's
    process ends early or says nothing any more.
    """
    plan = [(prompt_set, concurrency) for prompt_set in prompt_sets for concurrency in concurrencies]
    loads = tuple((prompt_set.conversations, concurrency) for prompt_set, concurrency in plan)
    for system in systems:
        drafter = None if system == PLAIN else job.drafter
        k = None if system == PLAIN else job.num_speculative_tokens
        own = replace(job, drafter=drafter, num_speculative_tokens=k, loads=loads)
        log = logs / f"{system.replace(' ', '-').replace(chr(39), '')}.log"
        with closing(_run_system(own, system, plan, log, on_start, on_record)) as runs:
            interrupted = False
            for run in runs:
                yield run
                interrupted = run.interrupted  # the last one then, and an engine's failure is raised behind it
        if interrupted:
            return


def _run_system(
    job: LoadJob,
    system: str,
    plan: Sequence[tuple[PromptSet, int]],
    log: Path,
    on_start: OnStart,
    on_record: Callable[[RequestRecord], None],
) -> Generator[Run, None, None]:
    environment = engine_environment(job, os.environ) | SWITCH[system]
    with engine_child(CHILD, job, environment, log) as (child, connection):
        on_start(system, "engine starts", 0, 0)
        ready = receive(child, connection, log, START_S)
        if not isinstance(ready, Ready):
            raise RuntimeError(f"the engine child broke its protocol: {ready!r} before it was ready")
        for prompt_set, concurrency in plan:
            num_requests = sum(len(conversation.turns) for conversation in prompt_set.conversations)
            on_start(system, prompt_set.name, concurrency, num_requests)
            # Every request ends by its timeout; a warm-up's are not told, and take as many turns as it needs.
            patience = job.timeout_seconds * (1 + math.ceil(job.warm_up / concurrency)) + SLACK_S
            records: list[RequestRecord] = []
            started = time.perf_counter()
            try:
                while not isinstance(message := receive(child, connection, log, patience), LoadFinished):
                    records.append(message)
                    on_record(message)
            except (KeyboardInterrupt, EngineFailedError) as end:
                seconds = time.perf_counter() - started
                child.terminate()  # or it would be given time to finish its job
                yield Run(system, prompt_set.name, concurrency, seconds, tuple(records), interrupted=True)
                if isinstance(end, EngineFailedError):
                    raise
                return
            yield with_notes(
                Run(system, prompt_set.name, concurrency, message.seconds, tuple(records), message.counters)
            )
