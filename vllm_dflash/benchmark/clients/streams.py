# SPDX-License-Identifier: Apache-2.0
"""What a stream's events say: text, when tokens came, how many there were, and how the drafts fared.

Each reader takes one response: `feed` it every event as it comes, then `finish`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_dflash.benchmark.clients.sse import ResponseError
from vllm_dflash.benchmark.records import ResponseAcceptance

DONE = "[DONE]"
#: Reasons to finish that are no end of an answer.
ABORTED = ("abort", "error")


@dataclass
class Streamed:
    """What has come so far. first_token, last_token: clock readings of the first and the last chunk with tokens."""

    text: str = ""
    first_token: float | None = None
    last_token: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    acceptance: ResponseAcceptance | None = None

    def tokens_came(self, now: float) -> None:
        self.first_token = now if self.first_token is None else self.first_token
        self.last_token = now


class StreamReader(Protocol):
    """Reads one response. Both methods raise ResponseError for what is not as the API has it."""

    streamed: Streamed

    def feed(self, data: str, now: float) -> None: ...

    def finish(self) -> Streamed: ...


class OpenAIStream:
    """`/v1/completions` and `/v1/chat/completions`, asked for usage in every chunk.

    A chunk carries tokens if the count of tokens has grown, or where a server counts only at the end, if it has text.
    """

    def __init__(self, chat: bool) -> None:
        self.streamed = Streamed()
        self.chat = chat
        self._saw_choice = self._finished = self._done = False

    def feed(self, data: str, now: float) -> None:
        if data == DONE:
            self._done = True
            return
        chunk = parse_object(data)
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            raise ResponseError("missing_field", f"no choices in {data[:80]!r}")
        before = self.streamed.output_tokens or 0
        if chunk.get("usage") is not None:
            self._read_usage(chunk["usage"])
        if choices:
            self._saw_choice = True
            text, visible = self._text(choices[0], data)
            self.streamed.text += text
            reason = choices[0].get("finish_reason")
            self._finished |= reason is not None
            if visible or (self.streamed.output_tokens or 0) > before:
                self.streamed.tokens_came(now)
            check_not_aborted(reason)
        self._read_metrics(chunk.get("metrics"))

    def _text(self, choice: Any, data: str) -> tuple[str, bool]:
        """The answer's text in this chunk, and whether there is anything at all (a thought, a tool call)."""
        piece = choice.get("delta" if self.chat else "text") if isinstance(choice, dict) else None
        if not isinstance(piece, dict if self.chat else str):
            raise ResponseError("missing_field", f"no {'delta' if self.chat else 'text'} in {data[:80]!r}")
        if isinstance(piece, str):
            return piece, bool(piece)
        said, text = ("content", "reasoning", "reasoning_content", "tool_calls"), piece.get("content") or ""
        if not isinstance(text, str):
            raise ResponseError("missing_field", f"content is no text in {data[:80]!r}")
        return text, any(piece.get(key) for key in said)

    def _read_usage(self, usage: Any) -> None:
        counts = [usage.get(key) if isinstance(usage, dict) else None for key in ("prompt_tokens", "completion_tokens")]
        if not all(isinstance(count, int) for count in counts):
            raise ResponseError("missing_field", f"usage without prompt_tokens and completion_tokens: {usage!r}"[:120])
        self.streamed.prompt_tokens, self.streamed.output_tokens = counts

    def _read_metrics(self, metrics: Any) -> None:
        """vLLM's figures of one request, where `--per-request-spec-decode-metrics` asks for them."""
        figures = metrics.get("speculative_decoding") if isinstance(metrics, dict) else None
        if not isinstance(figures, dict):
            return
        try:
            self.streamed.acceptance = ResponseAcceptance(
                float(figures["mean_acceptance_length"]),
                int(figures["num_spec_steps"]),
                int(figures["num_accepted_draft_tokens"]),
                int(figures["num_draft_tokens"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ResponseError("missing_field", f"metrics.speculative_decoding: {error!r}") from error

    def finish(self) -> Streamed:
        if not self._done:
            raise ResponseError("truncated", f"the stream ended without {DONE}")
        if not self._saw_choice:
            raise ResponseError("empty_choices", "no chunk had a choice")
        if not self._finished:
            raise ResponseError("missing_field", "no chunk had a finish_reason")
        if self.streamed.output_tokens is None:
            raise ResponseError("missing_field", "no usage: without it output tokens cannot be counted")
        return self.streamed


class GenerateStream:
    """SGLang's `/generate`: every event holds the whole text so far and `meta_info`."""

    def __init__(self) -> None:
        self.streamed = Streamed()
        self._finished = self._done = False

    def feed(self, data: str, now: float) -> None:
        if data == DONE:
            self._done = True
            return
        chunk = parse_object(data)
        meta = chunk.get("meta_info")
        if not isinstance(chunk.get("text"), str) or not isinstance(meta, dict):
            raise ResponseError("missing_field", f"no text or meta_info in {data[:80]!r}")
        tokens = meta.get("completion_tokens")
        if not isinstance(tokens, int):
            raise ResponseError("missing_field", f"no completion_tokens in meta_info: {meta!r}"[:120])
        self.streamed.text = chunk["text"]
        if tokens > (self.streamed.output_tokens or 0):
            self.streamed.tokens_came(now)
        self.streamed.output_tokens, self.streamed.prompt_tokens = tokens, meta.get("prompt_tokens")
        reason = meta.get("finish_reason")
        self._finished |= reason is not None
        check_not_aborted(reason.get("type") if isinstance(reason, dict) else reason)
        steps = meta.get("spec_verify_ct")
        if isinstance(steps, int) and steps > 0:
            # The first token comes with the prefill; every step gives what it accepted and one token more. SGLang's
            # own spec_accept_length counts the first token too.
            accepted = max(tokens - 1 - steps, 0)
            self.streamed.acceptance = ResponseAcceptance(1 + accepted / steps, steps, accepted)

    def finish(self) -> Streamed:
        if not (self._done and self._finished):
            raise ResponseError("truncated", f"the stream ended without {DONE if not self._done else 'finish_reason'}")
        if self.streamed.output_tokens is None:
            raise ResponseError("empty_choices", "no event had a text")
        return self.streamed


def check_not_aborted(reason: Any) -> None:
    """Raises ResponseError for a finish_reason with which the server says that it gave up."""
    if reason in ABORTED:
        raise ResponseError("aborted", f"the server ended it: finish_reason {reason}")


def parse_object(data: str) -> dict[str, Any]:
    """One event's JSON. Raises ResponseError if it is none, and for the error that a server reports inside a stream."""
    try:
        chunk = json.loads(data)
    except ValueError as error:
        raise ResponseError("bad_json", f"{error}: {data[:80]!r}") from error
    if not isinstance(chunk, dict):
        raise ResponseError("bad_json", f"not an object: {data[:80]!r}")
    if chunk.get("error"):
        raise ResponseError("server_error", str(chunk["error"])[:200])
    return chunk
