# SPDX-License-Identifier: Apache-2.0
"""Runs on servers that are up already: warmed up, measured, and with the servers' own counters over each run."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence

from vllm_dflash.benchmark.clients.load import Load, run_load
from vllm_dflash.benchmark.clients.serving import SETTLE_S, Server, flush_cache, read_counters
from vllm_dflash.benchmark.notes import with_notes
from vllm_dflash.benchmark.records import Counters, RequestRecord, Run
from vllm_dflash.benchmark.sets.conversations import Conversation, PromptSet


def run_servers(
    servers: Sequence[Server],
    prompt_sets: Sequence[PromptSet],
    concurrencies: Sequence[int],
    warm_up: int,
    on_start: Callable[[str, str, int, int], None],
    on_record: Callable[[RequestRecord], None],
) -> Generator[Run, None, None]:
    """One run for each prompt set, concurrency and server; servers take turns, so that all see the same machine.

    on_start: gets system, prompt set, concurrency and the number of requests. Ends after an interrupted run.
    """
    bench_id = f"{time.time_ns():x}"
    for prompt_set in prompt_sets:
        for concurrency in concurrencies:
            for server in servers:
                num_requests = sum(len(conversation.turns) for conversation in prompt_set.conversations)
                on_start(server.system, prompt_set.name, concurrency, num_requests)
                run = _run(server, prompt_set, concurrency, warm_up, bench_id, on_record)
                yield run
                if run.interrupted:
                    return


def _run(
    server: Server,
    prompt_set: PromptSet,
    concurrency: int,
    warm_up: int,
    bench_id: str,
    on_record: Callable[[RequestRecord], None],
) -> Run:
    conversations = prompt_set.conversations
    before, problem = read_counters(server)
    if warm_up:
        first_turns = [Conversation(c.name, c.turns[:1], c.history) for c in conversations[:warm_up]]
        warm = run_load(server.endpoint, first_turns, concurrency, salt=_salt(server, bench_id, "warm-up"))
        if warm.interrupted:
            return Run(server.system, prompt_set.name, concurrency, 0.0, (), interrupted=True)
        if before is not None:  # or the warm-up's last tokens would be counted in the run
            before, problem = _settled_counters(server, before, warm)
    cached = None if server.salted else flush_cache(server)
    salt = _salt(server, bench_id, f"{prompt_set.name}-{concurrency}")
    load = run_load(server.endpoint, conversations, concurrency, on_record, salt)
    counters, interrupted = None, load.interrupted
    if before is not None:
        try:
            counters, problem = _counted(server, before, load)
        except KeyboardInterrupt:
            interrupted, problem = True, f"{server.system}: Ctrl-C came before its counters were read."
    run = Run(server.system, prompt_set.name, concurrency, load.seconds, load.records, counters, (), interrupted)
    return with_notes(run, [note for note in (problem, cached) if note])


def _salt(server: Server, bench_id: str, of: str) -> str | None:
    return f"{bench_id}-{of}" if server.salted else None


def _counted(server: Server, before: Counters, load: Load) -> tuple[Counters | None, str | None]:
    """What the server counted over a load; or None and why not."""
    after, problem = _settled_counters(server, before, load)
    if after is None:
        return None, problem
    if after.fell_since(before):
        return None, f"{server.system}: its counters fell during the run: the server was restarted."
    return after - before, None


def _settled_counters(server: Server, before: Counters, load: Load) -> tuple[Counters | None, str | None]:
    """The counters once they hold the load's last tokens: a server sends tokens before it counts them."""
    tokens = sum(record.output_tokens for record in load.records)
    deadline = time.monotonic() + SETTLE_S
    while True:
        after, problem = read_counters(server)
        if after is None or after.output_tokens is None:
            return after, problem
        if after.output_tokens - (before.output_tokens or 0) >= tokens or time.monotonic() > deadline:
            return after, problem
        time.sleep(0.05)
