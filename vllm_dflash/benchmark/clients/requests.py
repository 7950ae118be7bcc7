# SPDX-License-Identifier: Apache-2.0
"""One request: what is sent, and the record of what came back, whatever goes wrong."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_dflash.benchmark.clients.sse import ResponseError, events
from vllm_dflash.benchmark.clients.streams import GenerateStream, OpenAIStream, StreamReader
from vllm_dflash.benchmark.records import RequestError, RequestRecord
from vllm_dflash.benchmark.templates import raw_text

if TYPE_CHECKING:
    import httpx

Messages = list[dict[str, str]]

#: Said, because a server would take them from the model's generation_config where a request does not.
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Endpoint:
    """Where requests go and what all of them ask for.

    api: "chat", "completions" or "generate" (SGLang's own).
    template: makes text of messages, for an API that takes text; None sends a prompt as it is.
    """

    base_url: str
    model: str
    api: str
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    timeout_seconds: float
    thinking: bool | None = None
    template: Callable[[Messages], str] | None = None

    @property
    def url(self) -> str:
        paths = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "generate": "/generate"}
        return self.base_url + paths[self.api]

    def body(self, messages: Messages, salt: str | None) -> dict[str, Any]:
        """salt: keeps vLLM's prefix cache of one run apart from that of the others; None for servers without it."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p, **NEUTRAL}
        text = self.template(messages) if self.template else raw_text(messages)
        if self.api == "generate":
            sampling["max_new_tokens"] = self.max_tokens
            if self.temperature > 0:
                sampling["sampling_seed"] = self.seed
            return {"text": text, "sampling_params": sampling, "stream": True}
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            **sampling,
            **({"messages": messages} if self.api == "chat" else {"prompt": text}),
        }
        if self.temperature > 0:
            body["seed"] = self.seed
        if salt is not None:
            body["cache_salt"] = salt
        if self.thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": self.thinking}
        return body

    def reader(self) -> StreamReader:
        return GenerateStream() if self.api == "generate" else OpenAIStream(chat=self.api == "chat")


async def send(
    client: httpx.AsyncClient,
    endpoint: Endpoint,
    name: str,
    turn: int,
    messages: Messages,
    start: float,
    salt: str | None,
) -> tuple[RequestRecord, str]:
    """The record and the text of one request, a conversation's turn. start: the clock's reading at the run's start.

    Only a cancellation leaves no record; every other failure is one.
    """
    import httpx

    reader, error = endpoint.reader(), None
    sent = time.perf_counter()
    try:
        body = endpoint.body(messages, salt)
        sent = time.perf_counter()
        await asyncio.wait_for(_stream(client, endpoint.url, body, reader), endpoint.timeout_seconds)
    except asyncio.TimeoutError:
        error = RequestError("timeout", f"no end after {endpoint.timeout_seconds:g} s")
    except ResponseError as failure:
        error = RequestError(failure.kind, failure.detail)
    except httpx.ConnectError as failure:
        error = RequestError("connection", f"{endpoint.base_url}: {failure}")
    except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as failure:
        cut = reader.streamed.output_tokens or reader.streamed.first_token is not None
        error = RequestError("truncated" if cut else "connection", f"{type(failure).__name__}: {failure}")
    except ValueError as failure:  # the template does not take these messages, or UTF-8 does not hold them
        error = RequestError("refused", f"{type(failure).__name__}: {failure}"[:200])
    return _record(reader, name, turn, sent - start, time.perf_counter() - start, start, error), reader.streamed.text


async def _stream(client: httpx.AsyncClient, url: str, body: dict[str, Any], reader: StreamReader) -> None:
    async with client.stream("POST", url, json=body) as response:
        if response.status_code != 200:
            detail = (await response.aread()).decode(errors="replace")
            raise ResponseError(f"http_{response.status_code}", detail[:200])
        async for data in events(response.aiter_lines()):
            reader.feed(data, time.perf_counter())
    reader.finish()


def _record(
    reader: StreamReader, name: str, turn: int, sent: float, ended: float, start: float, error: RequestError | None
) -> RequestRecord:
    streamed = reader.streamed
    return RequestRecord(
        name=name,
        turn=turn,
        sent=sent,
        ended=ended,
        first_token=None if streamed.first_token is None else streamed.first_token - start,
        last_token=None if streamed.last_token is None else streamed.last_token - start,
        prompt_tokens=streamed.prompt_tokens,
        output_tokens=streamed.output_tokens or 0,
        acceptance=streamed.acceptance,
        error=error,
    )
