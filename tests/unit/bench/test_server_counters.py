# SPDX-License-Identifier: Apache-2.0
"""Counters around a run: of whom they are, what they hold, and what is said where they cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.bench import fake_server as fakes
from tests.unit.bench.fake_server import FakeServer, Handler, fake_server
from tests.unit.bench.test_counters import VLLM
from tests.unit.bench.test_load import endpoint, prompts
from vllm_dflash.benchmark.clients import server as server_runs
from vllm_dflash.benchmark.clients.server import run_servers
from vllm_dflash.benchmark.clients.serving import Server
from vllm_dflash.benchmark.records import Run
from vllm_dflash.benchmark.sets.conversations import PromptSet


def measure(
    server: FakeServer, warm_up: int = 0, salted: bool = True, concurrencies: tuple[int, ...] = (1,)
) -> list[Run]:
    """Four prompts with seven tokens each."""
    one = Server("server", endpoint(server.url), f"{server.url}/metrics", salted)
    sets = [PromptSet("own", tuple(prompts(4)), "own.jsonl")]
    return list(run_servers([one], sets, concurrencies, warm_up, lambda *what: None, lambda record: None))


def tokens_counted(tokens: int, model: str = "fake") -> str:
    name = "vllm:generation_tokens_total"
    return f'# TYPE {name} counter\n{name}{{engine="0",model_name="{model}"}} {tokens}\n'


def test_counters_of_another_model_are_not_taken_for_none() -> None:
    with fake_server(fakes.answer, lambda: VLLM) as server:
        (run,) = measure(server)
    assert run.counters is None
    assert run.notes == (f"server: {server.url}/metrics holds no counters of model fake; they are of m, other.",)


def test_a_server_that_was_restarted_has_no_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_runs, "SETTLE_S", 0.1)
    servers: list[FakeServer] = []
    with fake_server(fakes.answer, lambda: tokens_counted(14 if servers[0].requests else 1000)) as server:
        servers.append(server)
        (run,) = measure(server)
    assert run.counters is None and len(run.requests) == 4
    assert run.notes == ("server: its counters fell during the run: the server was restarted.",)


def test_the_warm_ups_last_tokens_are_not_in_the_run() -> None:
    """A server that shows each time what it had counted at the time before."""
    servers: list[FakeServer] = []
    seen = [0]

    def late() -> str:
        seen.append(len(servers[0].requests))
        return tokens_counted(7 * seen[-2])

    with fake_server(fakes.answer, late) as server:
        servers.append(server)
        (run,) = measure(server, warm_up=1)
    assert run.counters is not None and run.counters.output_tokens == 28
    assert run.notes == ()


def test_counters_are_said_to_hold_failed_requests() -> None:
    def second_fails(handler: Handler, body: dict[str, Any]) -> None:
        (fakes.truncated if body["messages"][-1]["content"] == "say 1" else fakes.answer)(handler, body)

    servers: list[FakeServer] = []
    with fake_server(second_fails, lambda: tokens_counted(7 * len(servers[0].requests))) as server:
        servers.append(server)
        (run,) = measure(server)
    (note,) = run.notes
    assert note.startswith(
        "server, own at concurrency 1: 1 of 4 requests failed. What the server did for them is in its"
    )


def test_ctrl_c_while_counters_are_read_keeps_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    read: Callable[..., Any] = server_runs.read_counters
    calls = []

    def interrupted_at_the_second(server: Server) -> Any:
        calls.append(server)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return read(server)

    monkeypatch.setattr(server_runs, "read_counters", interrupted_at_the_second)
    with fake_server(fakes.answer, lambda: tokens_counted(0)) as server:
        (run,) = measure(server, concurrencies=(1, 2))
    assert [record.error for record in run.requests] == [None] * 4
    assert run.interrupted and run.counters is None
    assert run.notes == ("server: Ctrl-C came before its counters were read.",)


def test_a_server_without_salt_is_flushed_before_each_run() -> None:
    with fake_server(fakes.answer) as server:
        runs = measure(server, salted=False, concurrencies=(1, 2))
        assert server.flushes == 2
        server.flush_status = 404
        (refused,) = measure(server, salted=False)
        measure(server)
    assert server.flushes == 3
    assert all("its cache" not in note for run in runs for note in run.notes)
    expected = f"server: its cache still holds the prompts of earlier runs: {server.url}/flush_cache: HTTP 404"
    assert expected in refused.notes
