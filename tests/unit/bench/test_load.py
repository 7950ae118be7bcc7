# SPDX-License-Identifier: Apache-2.0
"""Conversations over a real socket, with servers that behave well and badly."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.bench import fake_server as fakes
from tests.unit.bench.fake_server import FakeServer, Handler, chunk, fake_server, usage
from vllm_dflash.benchmark.clients.load import run_load
from vllm_dflash.benchmark.clients.requests import Endpoint
from vllm_dflash.benchmark.measures import summarise
from vllm_dflash.benchmark.records import Run
from vllm_dflash.benchmark.sets.conversations import Conversation


def endpoint(url: str, **changes: Any) -> Endpoint:
    fields = {"base_url": url, "model": "fake", "api": "chat", "max_tokens": 8, "temperature": 0.0, "top_p": 1.0}
    return Endpoint(**(fields | {"seed": 3, "timeout_seconds": 10.0} | changes))


def prompts(count: int) -> list[Conversation]:
    return [Conversation(f"p{number}", (f"say {number}",)) for number in range(count)]


def test_a_good_answer_is_measured() -> None:
    with fake_server(fakes.answer) as server:
        load = run_load(endpoint(server.url), prompts(3), 2)
    assert sorted(record.name for record in load.records) == ["p0", "p1", "p2"]
    for record in load.records:
        assert (record.error, record.output_tokens, record.prompt_tokens) == (None, 7, 5)
        assert record.first_token is not None and record.last_token is not None
        assert 0 <= record.sent < record.first_token <= record.last_token <= record.ended <= load.seconds + 0.1
    assert not load.interrupted


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (fakes.error_500, "http_500"),
        (fakes.bad_json, "bad_json"),
        (fakes.bad_sse, "bad_sse"),
        (fakes.truncated, "truncated"),
        (fakes.cut, "truncated"),
        (fakes.cut_before_a_token, "connection"),
        (fakes.hang_up, "connection"),
        (fakes.no_choices_field, "missing_field"),
        (fakes.no_usage, "missing_field"),
        (fakes.empty_choices, "empty_choices"),
        (fakes.error_in_stream, "server_error"),
        (fakes.content_that_is_no_text, "missing_field"),
        (fakes.aborted, "aborted"),
    ],
)
def test_a_failure_is_counted_by_kind_and_stops_no_other(reply: Callable[..., None], kind: str) -> None:
    """Every second request fails; the others are measured all the same."""

    def every_second(handler: Handler, body: dict[str, Any]) -> None:
        (reply if "1" in body["messages"][-1]["content"] else fakes.answer)(handler, body)

    with fake_server(every_second) as server:
        load = run_load(endpoint(server.url), [Conversation(f"p{i}", (f"say {i % 2}",)) for i in range(6)], 2)
    summary = summarise(Run("x", "y", 2, load.seconds, load.records))
    assert (summary.requests, summary.errors, summary.output_tokens) == (6, {kind: 3}, 21)


def test_a_slow_server_times_out_and_its_tokens_do_not_count() -> None:
    with fake_server(fakes.slow) as server:
        started = time.perf_counter()
        load = run_load(endpoint(server.url, timeout_seconds=0.3), prompts(2), 2)
        assert time.perf_counter() - started < 3
    summary = summarise(Run("x", "y", 2, load.seconds, load.records))
    assert (summary.errors, summary.output_tokens, summary.tokens_per_second) == ({"timeout": 2}, 0, None)


def test_a_server_that_is_not_there_refuses_every_request() -> None:
    with fake_server(fakes.answer) as server:
        url = server.url
    load = run_load(endpoint(url), prompts(3), 2)
    assert [record.error.kind for record in load.records if record.error] == ["connection"] * 3


def test_a_killed_server_fails_the_requests_in_flight_and_those_to_come() -> None:
    """The first request is answered; the second one's server goes away in the middle of its stream."""
    servers: list[FakeServer] = []

    def die_at_the_second(handler: Handler, body: dict[str, Any]) -> None:
        if "0" in body["messages"][-1]["content"]:
            fakes.answer(handler, body)
        else:
            handler.start_stream()
            handler.event(chunk("a", 1))
            servers[0].server_close()  # no new connections
            handler.connection.close()

    with fake_server(die_at_the_second) as server:
        servers.append(server)
        load = run_load(endpoint(server.url), prompts(4), 1)
    kinds = [record.error.kind if record.error else "done" for record in load.records]
    assert kinds == ["done", "truncated", "connection", "connection"]


def test_concurrency_is_kept_and_not_exceeded() -> None:
    """Four requests wait for each other, so three at once would hang, and five are seen."""
    together, lock, in_flight, most = threading.Barrier(4), threading.Lock(), 0, 0

    def count(handler: Handler, body: dict[str, Any]) -> None:
        nonlocal in_flight, most
        with lock:
            in_flight += 1
            most = max(most, in_flight)
        together.wait(timeout=5)
        time.sleep(0.05)
        with lock:
            in_flight -= 1
        fakes.answer(handler, body)

    with fake_server(count) as server:
        load = run_load(endpoint(server.url), prompts(8), 4)
    assert [record.error for record in load.records] == [None] * 8
    assert most == 4


def test_the_second_turn_follows_the_models_own_first_answer() -> None:
    def echo(handler: Handler, body: dict[str, Any]) -> None:
        handler.start_stream()
        handler.event(chunk(f"answer to {body['messages'][-1]['content']}", 2, "stop"))
        handler.event(usage(2))
        handler.event("[DONE]")

    history = ({"role": "system", "content": "be brief"},)
    with fake_server(echo) as server:
        load = run_load(endpoint(server.url), [Conversation("p", ("one", "two"), history)], 1)
    assert [record.turn for record in load.records] == [1, 2]
    assert server.requests[1][1]["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "answer to one"},
        {"role": "user", "content": "two"},
    ]


def test_a_recorded_answer_before_the_first_turn_is_no_turn() -> None:
    history = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
    with fake_server(fakes.answer) as server:
        load = run_load(endpoint(server.url), [Conversation("p", ("one", "two"), history)], 1)
    assert [record.turn for record in load.records] == [1, 2]


def test_a_prompt_that_cannot_be_sent_stops_no_other() -> None:
    """UTF-8 does not hold half a surrogate pair."""
    conversations = [Conversation("a", ("one",)), Conversation("b", ("\ud800",)), Conversation("c", ("two",))]
    with fake_server(fakes.answer) as server:
        load = run_load(endpoint(server.url), conversations, 1)
    assert [record.error.kind if record.error else None for record in load.records] == [None, "refused", None]


def test_a_prompt_that_the_template_does_not_take_stops_no_other() -> None:
    def template(messages: list[dict[str, str]]) -> str:
        if messages[-1]["content"] == "say 1":
            raise ValueError("roles must alternate")
        return "text"

    with fake_server(fakes.answer) as server:
        load = run_load(endpoint(server.url, api="completions", template=template), prompts(3), 1)
    refused = load.records[1].error
    assert refused is not None and (refused.kind, refused.detail) == ("refused", "ValueError: roles must alternate")
    assert [record.name for record in load.records] == ["p0", "p1", "p2"] and len(server.requests) == 2


def test_a_turn_is_not_sent_after_a_failed_one() -> None:
    with fake_server(fakes.error_500) as server:
        load = run_load(endpoint(server.url), [Conversation("p", ("one", "two"))], 1)
    assert len(load.records) == len(server.requests) == 1


def test_what_is_sent() -> None:
    with fake_server(fakes.answer) as server:
        run_load(endpoint(server.url, thinking=False, temperature=0.7), prompts(1), 1, salt="s")
        run_load(endpoint(server.url, api="completions"), prompts(1), 1)
        run_load(endpoint(server.url, api="generate"), prompts(1), 1)
        run_load(endpoint(server.url, api="generate", temperature=0.7), prompts(1), 1)
    usage_wanted = {"include_usage": True, "continuous_usage_stats": True}
    neutral = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    common = neutral | {"model": "fake", "max_tokens": 8, "stream": True, "stream_options": usage_wanted}
    assert server.requests == [
        (
            "/v1/chat/completions",
            common | {
                "messages": [{"role": "user", "content": "say 0"}], "temperature": 0.7, "seed": 3, "cache_salt": "s",
                "chat_template_kwargs": {"enable_thinking": False},
            },
        ),
        ("/v1/completions", common | {"prompt": "say 0", "temperature": 0.0}),
        (
            "/generate",
            {
                "text": "say 0", "stream": True,
                "sampling_params": neutral | {"temperature": 0.0, "max_new_tokens": 8},
            },
        ),
        (
            "/generate",
            {
                "text": "say 0", "stream": True,
                "sampling_params": neutral | {"temperature": 0.7, "max_new_tokens": 8, "sampling_seed": 3},
            },
        ),
    ]  # fmt: skip
