# SPDX-License-Identifier: Apache-2.0
"""Streams, event by event, with a clock of whole numbers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.unit.bench.fake_server import chunk, usage
from vllm_dflash.benchmark.clients.sse import ResponseError, events
from vllm_dflash.benchmark.clients.streams import GenerateStream, OpenAIStream, StreamReader
from vllm_dflash.benchmark.records import ResponseAcceptance


def read(reader: StreamReader, *chunks: Any) -> Any:
    """Each chunk comes one second after the one before, the first at 1 s."""
    for now, data in enumerate(chunks, start=1):
        reader.feed(data if isinstance(data, str) else json.dumps(data), float(now))
    return reader.finish()


def parsed(*lines: str) -> list[str]:
    async def everything() -> list[str]:
        async def source() -> AsyncIterator[str]:
            for line in lines:
                yield line

        return [event async for event in events(source())]

    return asyncio.run(everything())


def test_events_end_at_empty_lines_and_comments_are_none() -> None:
    lines = ("data: a", "data:b", "", ": keep-alive", "", "event: x", "id: 7", "data: [DONE]")
    assert parsed(*lines) == ["a\nb", "[DONE]"]


def test_a_line_that_is_no_part_of_an_event_is_an_error() -> None:
    with pytest.raises(ResponseError, match="bad_sse: .*<html>"):
        parsed("data: a", "", "<html>")


def test_tokens_are_counted_by_usage_and_a_role_is_no_token() -> None:
    role = {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    found = read(OpenAIStream(True), role, chunk("a", 1), chunk("bcd", 4), chunk("", 7, "stop"), usage(7), "[DONE]")
    # The last chunk has no text (half a character, say), and three tokens all the same.
    assert (found.first_token, found.last_token) == (2.0, 4.0)
    assert (found.output_tokens, found.prompt_tokens, found.text) == (7, 5, "abcd")


def test_a_server_that_counts_only_at_the_end_is_timed_by_its_text() -> None:
    found = read(OpenAIStream(True), chunk("a", None), chunk("", None), chunk("b", None, "stop"), usage(9), "[DONE]")
    assert (found.first_token, found.last_token, found.output_tokens) == (1.0, 3.0, 9)


def test_thoughts_are_tokens_but_no_answer() -> None:
    thought = {"choices": [{"delta": {"reasoning_content": "hm"}, "finish_reason": None}]}
    found = read(OpenAIStream(True), thought, chunk("b", None, "stop"), usage(2), "[DONE]")
    assert (found.first_token, found.text) == (1.0, "b")


def test_completions_have_text_instead_of_a_delta() -> None:
    text = {"choices": [{"text": "ab", "finish_reason": "length"}]}
    assert read(OpenAIStream(False), text, usage(2), "[DONE]").text == "ab"
    with pytest.raises(ResponseError, match="missing_field: no text"):
        read(OpenAIStream(False), chunk("a", 1))


def test_figures_of_one_request() -> None:
    figures = {
        "mean_acceptance_length": 3.5, "draft_acceptance_rate": 0.25, "acceptance_histogram": [1, 0, 0, 3],
        "num_spec_steps": 4, "num_accepted_draft_tokens": 10, "num_draft_tokens": 40, "num_spec_tokens": 10,
    }  # fmt: skip
    last = usage(1, metrics={"speculative_decoding": figures})
    found = read(OpenAIStream(True), chunk("a", 1, "stop"), last, "[DONE]")
    assert found.acceptance == ResponseAcceptance(3.5, drafts=4, accepted=10, drafted=40)


@pytest.mark.parametrize(
    ("chunks", "error"),
    [
        ([chunk("a", 1, "stop"), usage(1)], r"truncated: .*without \[DONE\]"),
        ([usage(1), "[DONE]"], "empty_choices"),
        ([chunk("a", 1, "abort")], "aborted: the server ended it: finish_reason abort"),
        ([chunk("a", 1, "error")], "aborted: the server ended it: finish_reason error"),
        ([chunk("a", 1), "[DONE]"], "missing_field: no chunk had a finish_reason"),
        ([chunk("a", None, "stop"), "[DONE]"], "missing_field: no usage"),
        ([{"choices": [{"finish_reason": None}]}], "missing_field: no delta"),
        ([{"choices": [7]}], "missing_field: no delta"),
        ([{"object": "x"}], "missing_field: no choices"),
        ([{"choices": [], "usage": {"prompt_tokens": 3}}], "missing_field: usage without"),
        ([usage(1, metrics={"speculative_decoding": {}})], "missing_field: metrics.speculative_decoding"),
        (['{"choices"'], "bad_json"),
        (["[]"], "bad_json: not an object"),
        ([{"error": {"message": "out of memory"}}], "server_error: .*out of memory"),
    ],
)
def test_a_malformed_response_is_named(chunks: list[Any], error: str) -> None:
    with pytest.raises(ResponseError, match=error):
        read(OpenAIStream(True), *chunks)


def test_generate_tells_the_whole_text_each_time() -> None:
    def event(text: str, tokens: int, **meta: Any) -> dict[str, Any]:
        return {"text": text, "meta_info": {"completion_tokens": tokens, "prompt_tokens": 4, **meta}}

    end = event("abcdefg", 7, finish_reason={"type": "stop"}, spec_verify_ct=2)
    found = read(GenerateStream(), event("a", 1), event("abcd", 4), end, "[DONE]")
    assert (found.text, found.output_tokens, found.first_token, found.last_token) == ("abcdefg", 7, 1.0, 3.0)
    # One token of the prefill, then two steps with 6 tokens: 3 a step, of which one is the bonus token.
    assert found.acceptance == ResponseAcceptance(3.0, drafts=2, accepted=4)
    with pytest.raises(ResponseError, match="truncated"):
        read(GenerateStream(), event("a", 1))
    with pytest.raises(ResponseError, match="aborted: .*finish_reason abort"):
        read(GenerateStream(), event("a", 1, finish_reason={"type": "abort", "message": "out of memory"}))
    with pytest.raises(ResponseError, match="missing_field: no completion_tokens"):
        read(GenerateStream(), {"text": "a", "meta_info": {}})
