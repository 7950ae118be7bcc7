# SPDX-License-Identifier: Apache-2.0
"""Runs on servers that are up already: what a server is called, its counters around a run, and what was odd."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from vllm_dflash.benchmark.clients.counters import parse_counters
from vllm_dflash.benchmark.clients.load import Load, run_load
from vllm_dflash.benchmark.clients.requests import Endpoint
from vllm_dflash.benchmark.notes import with_notes
from vllm_dflash.benchmark.records import Counters, RequestRecord, Run
from vllm_dflash.benchmark.sets.conversations import Conversation, PromptSet

REPLY_S = 10.0
#: How long a server may take to count the last tokens that it has sent.
SETTLE_S = 3.0


@dataclass(frozen=True)
class Server:
    """system: what it is called in tables. salted: whether it takes vLLM's `cache_salt`."""

    system: str
    endpoint: Endpoint
    metrics_url: str
    salted: bool


def served_model(base_url: str, flag: str) -> str:
    """The name that the server gives to its model. Raises ValueError naming the flag if it does not answer."""
    import httpx

    url = f"{base_url}/v1/models"
    try:
        reply = httpx.get(url, timeout=REPLY_S)
        reply.raise_for_status()
        return str(reply.json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{flag} {base_url}: {url} does not name a model: {error!r}"[:300]) from error


def read_counters(server: Server) -> tuple[Counters | None, str | None]:
    """What it has counted since its start; or None and why not."""
    import httpx

    try:
        reply = httpx.get(server.metrics_url, timeout=REPLY_S)
        reply.raise_for_status()
        counters = parse_counters(reply.text, server.endpoint.model)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        return None, f"{server.system}: no counters from {server.metrics_url}: {type(error).__name__}: {error}"[:300]
    if counters == Counters():
        return None, f"{server.system}: {server.metrics_url} holds none of vLLM's counters."
    return counters, None


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
    session = f"{time.time_ns():x}"
    for prompt_set in prompt_sets:
        for concurrency in concurrencies:
            for server in servers:
                num_requests = sum(len(conversation.turns) for conversation in prompt_set.conversations)
                on_start(server.system, prompt_set.name, concurrency, num_requests)
                run = _run(server, prompt_set, concurrency, warm_up, session, on_record)
                yield run
                if run.interrupted:
                    return


def _run(
    server: Server,
    prompt_set: PromptSet,
    concurrency: int,
    warm_up: int,
    session: str,
    on_record: Callable[[RequestRecord], None],
) -> Run:
    conversations = prompt_set.conversations
    if warm_up:
        first_turns = [Conversation(c.name, c.turns[:1], c.history) for c in conversations[:warm_up]]
        salt = f"{session}-warm-up" if server.salted else None
        if run_load(server.endpoint, first_turns, concurrency, salt=salt).interrupted:
            return Run(server.system, prompt_set.name, concurrency, 0.0, (), interrupted=True)
    before, problem = read_counters(server)
    salt = f"{session}-{prompt_set.name}-{concurrency}" if server.salted else None
    load = run_load(server.endpoint, conversations, concurrency, on_record, salt)
    counters = None
    if before is not None:
        after, problem = _settled_counters(server, before, load)
        counters = after - before if after is not None else None
    run = Run(
        server.system, prompt_set.name, concurrency, load.seconds, load.records, counters, interrupted=load.interrupted
    )
    return with_notes(run, [problem] if problem else [])


def _settled_counters(server: Server, before: Counters, load: Load) -> tuple[Counters | None, str | None]:
    """The counters once they hold the run's last tokens: a server sends tokens before it counts them."""
    tokens = sum(record.output_tokens for record in load.records)
    deadline = time.monotonic() + SETTLE_S
    while True:
        after, problem = read_counters(server)
        counted = (after - before).output_tokens if after is not None else None
        if counted is None or counted >= tokens or time.monotonic() > deadline:
            return after, problem
        time.sleep(0.05)
