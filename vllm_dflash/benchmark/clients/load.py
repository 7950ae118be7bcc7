# SPDX-License-Identifier: Apache-2.0
"""Many conversations at once: a fixed number in flight, the next one starts when one ends.

No failure stops the others.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_dflash.benchmark.clients.requests import Endpoint, send
from vllm_dflash.benchmark.records import RequestError, RequestRecord
from vllm_dflash.benchmark.sets.conversations import Conversation


@dataclass(frozen=True)
class Load:
    """What came of it. seconds: from the first request sent to the last one ended."""

    records: tuple[RequestRecord, ...]
    seconds: float
    interrupted: bool


def run_load(
    endpoint: Endpoint,
    conversations: Sequence[Conversation],
    concurrency: int,
    on_record: Callable[[RequestRecord], None] = lambda record: None,
    salt: str | None = None,
) -> Load:
    """Ctrl-C ends the requests in flight and returns what there is; they are counted as `interrupted`."""
    return asyncio.run(_run_load(endpoint, conversations, concurrency, on_record, salt))


async def _run_load(
    endpoint: Endpoint,
    conversations: Sequence[Conversation],
    concurrency: int,
    on_record: Callable[[RequestRecord], None],
    salt: str | None,
) -> Load:
    import httpx

    records: list[RequestRecord] = []
    free = asyncio.Semaphore(concurrency)
    start = time.perf_counter()

    def keep(record: RequestRecord) -> None:
        records.append(record)
        on_record(record)

    async def converse(client: httpx.AsyncClient, conversation: Conversation) -> None:
        async with free:
            messages = list(conversation.history)
            for number, turn in enumerate(conversation.turns, start=1):
                messages.append({"role": "user", "content": turn})
                sent = time.perf_counter() - start
                try:
                    record, text = await send(client, endpoint, conversation.name, number, messages, start, salt)
                except asyncio.CancelledError:
                    error = RequestError("interrupted", "ended by Ctrl-C")
                    keep(RequestRecord(conversation.name, number, sent, time.perf_counter() - start, error=error))
                    raise
                keep(record)
                if record.error:
                    return
                messages.append({"role": "assistant", "content": text})

    # Timeouts are the request's own, over all of it; a pool of connections would make requests wait for each other.
    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as client:
        tasks = [asyncio.create_task(converse(client, conversation)) for conversation in conversations]
        interrupted = await _finish(tasks)
    ended = max((record.ended for record in records), default=0.0)
    return Load(tuple(records), ended - min((record.sent for record in records), default=0.0), interrupted)


async def _finish(tasks: Sequence[asyncio.Task[None]]) -> bool:
    """Wait for all tasks, or end them at Ctrl-C. Returns whether they were ended. Raises what a task raised."""
    loop, interrupted = asyncio.get_running_loop(), False

    def end_all() -> None:
        nonlocal interrupted
        interrupted = True
        for task in tasks:
            task.cancel()

    loop.add_signal_handler(signal.SIGINT, end_all)
    try:
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    for outcome in outcomes:
        if isinstance(outcome, Exception):  # a cancellation is none
            raise outcome
    return interrupted
