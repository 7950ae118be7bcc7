# SPDX-License-Identifier: Apache-2.0
"""The engine child of `vllm-dflash bench --backend offline`: conversations at a given concurrency on vLLM's `LLM(...)`.

`LLM.generate` takes a batch and returns when all of it is done. Here the engine is stepped instead, so that a request
can follow as soon as another ends, and every token is timed when the step that made it returns: the same closed loop,
and the same measures, as against a server.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_dflash.benchmark.clients.counters import parse_counters
from vllm_dflash.benchmark.clients.streams import ABORTED
from vllm_dflash.benchmark.job import LoadFinished, LoadJob, Ready
from vllm_dflash.benchmark.offline import serve_job
from vllm_dflash.benchmark.records import Counters, RequestError, RequestRecord, ResponseAcceptance
from vllm_dflash.benchmark.sets.conversations import Conversation
from vllm_dflash.benchmark.templates import prompt_ids

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

#: Arguments of `LLM(...)` that are the benchmark's own to set.
OWN_ARGUMENTS = (
    "model", "dtype", "disable_log_stats", "seed", "speculative_config", "per_request_spec_decode_metrics",
)  # fmt: skip

LoadMessage = Ready | RequestRecord | LoadFinished


def run_loads(job: LoadJob) -> Iterator[LoadMessage]:
    """Start the engine, then yield `Ready` and for each load its records and `LoadFinished`."""
    started = time.perf_counter()
    llm = start_engine(job)
    yield Ready(time.perf_counter() - started)
    for number, (conversations, concurrency) in enumerate(job.loads):
        first_turns = [Conversation(c.name, c.turns[:1], c.history) for c in conversations[: job.warm_up]]
        for _ in Load(llm, job, first_turns, concurrency, f"{number}-warm-up").records():
            pass
        before = read_counters()
        load = Load(llm, job, conversations, concurrency, str(number))
        yield from load.records()
        yield LoadFinished(load.seconds, read_counters() - before)


def start_engine(job: LoadJob) -> LLM:
    from vllm import LLM

    speculation: dict[str, Any] = {}
    if job.drafter:
        method = {"method": "dflash", "model": job.drafter, "num_speculative_tokens": job.num_speculative_tokens}
        speculation = {"speculative_config": method, "per_request_spec_decode_metrics": "summary"}
    arguments = {"max_num_seqs": max(concurrency for _, concurrency in job.loads)} | job.engine_args
    return LLM(
        model=job.target,
        dtype=job.dtype,
        disable_log_stats=False,  # or there are no counters to read
        seed=job.seed,
        **speculation,
        **arguments,
    )


def read_counters() -> Counters:
    """Of this process's engine, read as a server would show them."""
    from prometheus_client import REGISTRY, generate_latest

    return parse_counters(generate_latest(REGISTRY).decode())


@dataclass
class InFlight:
    """A conversation, its messages so far, and the request that is under way. Clock readings are seconds from start."""

    conversation: Conversation
    turn: int = 0
    messages: list[dict[str, str]] = field(default_factory=list)
    sent: float = 0.0
    first_token: float | None = None
    last_token: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    acceptance: ResponseAcceptance | None = None

    def record(self, now: float, error: RequestError | None = None) -> RequestRecord:
        return RequestRecord(
            self.conversation.name, self.turn, self.sent, now, self.first_token, self.last_token, self.prompt_tokens,
            self.output_tokens, self.acceptance, error,
        )  # fmt: skip


class Load:
    """Conversations on one engine, `concurrency` of them at once."""

    def __init__(
        self, llm: LLM, job: LoadJob, conversations: Sequence[Conversation], concurrency: int, salt: str
    ) -> None:
        self.engine, self.tokenizer = llm.llm_engine, llm.get_tokenizer()
        self.job, self.concurrency, self.salt = job, concurrency, salt
        self.waiting = deque(conversations)
        self.in_flight: dict[str, InFlight] = {}
        self.start = time.perf_counter()
        self.seconds = 0.0
        self._num_requests = 0

    def records(self) -> Iterator[RequestRecord]:
        """One for each request, when it ends."""
        while self.waiting or self.in_flight:
            while self.waiting and len(self.in_flight) < self.concurrency:
                conversation = self.waiting.popleft()
                yield from self._next_turn(InFlight(conversation, messages=list(conversation.history)))
            if self.in_flight:
                outputs = self.engine.step()
                yield from self._read(outputs)
                yield from self._end_late_ones()
        self.seconds = self._now()

    def _now(self) -> float:
        return time.perf_counter() - self.start

    def _next_turn(self, one: InFlight) -> Iterator[RequestRecord]:
        """Send a conversation's next turn. A record only if the engine refuses it."""
        from vllm.exceptions import VLLMClientError

        one.messages.append({"role": "user", "content": one.conversation.turns[one.turn]})
        turn = InFlight(one.conversation, one.turn + 1, one.messages, self._now())
        self._num_requests += 1
        name = f"{self.salt}-{self._num_requests}"
        try:
            token_ids = prompt_ids(self.tokenizer, one.messages, self.job.chat, self.job.thinking)
            turn.prompt_tokens = len(token_ids)
            self.engine.add_request(name, {"prompt_token_ids": token_ids, "cache_salt": self.salt}, self._sampling())
        # A prompt beyond the model's length, or messages that the template does not take.
        except (VLLMClientError, ValueError) as error:
            yield turn.record(self._now(), RequestError("refused", str(error)[:200]))
            return
        self.in_flight[name] = turn

    def _sampling(self) -> SamplingParams:
        """What is not said here is neutral by itself: `LLM` takes nothing from the model's generation_config."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=self.job.temperature, top_p=self.job.top_p, max_tokens=self.job.max_tokens,
            seed=self.job.seed if self.job.temperature > 0 else None, output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip

    def _read(self, outputs: Sequence[Any]) -> Iterator[RequestRecord]:
        now = self._now()
        for output in outputs:
            one = self.in_flight.get(output.request_id)
            if one is None:  # what an aborted request still had under way
                continue
            completion = output.outputs[0]
            if completion.token_ids:
                one.first_token = now if one.first_token is None else one.first_token
                one.last_token = now
            one.output_tokens += len(completion.token_ids)
            one.text += completion.text
            if output.finished:
                del self.in_flight[output.request_id]
                if completion.finish_reason in ABORTED:
                    reason = f"the engine ended it: finish_reason {completion.finish_reason}"
                    yield one.record(now, RequestError("aborted", reason))
                    continue
                one.acceptance = _acceptance(completion.spec_decode_metrics)
                yield one.record(now)
                if one.turn < len(one.conversation.turns):
                    one.messages.append({"role": "assistant", "content": one.text})
                    yield from self._next_turn(one)

    def _end_late_ones(self) -> Iterator[RequestRecord]:
        now, limit = self._now(), self.job.timeout_seconds
        for name in [name for name, one in self.in_flight.items() if now - one.sent > limit]:
            self.engine.abort_request([name])
            yield self.in_flight.pop(name).record(now, RequestError("timeout", f"no end after {limit:g} s"))


def _acceptance(metrics: Any) -> ResponseAcceptance | None:
    if metrics is None:
        return None
    told = metrics.to_dict()
    return ResponseAcceptance(
        told["mean_acceptance_length"],
        told["num_spec_steps"],
        told["num_accepted_draft_tokens"],
        told["num_draft_tokens"],
    )


if __name__ == "__main__":
    serve_job(run_loads)
