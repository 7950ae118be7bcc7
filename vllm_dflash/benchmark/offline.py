# SPDX-License-Identifier: Apache-2.0
"""The engine child: runs vLLM's `LLM(...)` on one job and reports over a pipe.

Started by `engine_process` as `python -m vllm_dflash.benchmark.offline FD`, leader of its own process group. An engine
gets a process of its own because vLLM gives its memory, threads and counters back only when the process ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from vllm_dflash.benchmark.job import EngineJob, Finished, Prompt, Ready, Response
from vllm_dflash.benchmark.metrics import AcceptanceCounts

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

Message = Ready | Response | Finished


def run_job(job: EngineJob) -> Iterator[Message]:
    """Start the engine, then yield `Ready`, a `Response` for each prompt and `Finished`."""
    start = time.perf_counter()
    llm, sampling = start_engine(job)
    if job.warm_up:
        _generate(llm, job.prompts[0], sampling, job.chat)
    yield Ready(time.perf_counter() - start)

    before = acceptance_counts(llm) if job.drafter else None
    for prompt in job.prompts:
        yield _generate(llm, prompt, sampling, job.chat)
    yield Finished(acceptance_counts(llm) - before if before else None)


def start_engine(job: EngineJob) -> tuple[LLM, SamplingParams]:
    from vllm import LLM, SamplingParams

    speculation: dict[str, Any] | None = None
    if job.drafter:
        speculation = {"method": "dflash", "model": job.drafter, "num_speculative_tokens": job.num_speculative_tokens}
    llm = LLM(
        model=job.target,
        dtype=job.dtype,
        max_num_seqs=1,
        # A prompt that the warm-up left in the cache would skip its prefill when timed.
        enable_prefix_caching=False,
        disable_log_stats=False,  # or there are no counters to read
        speculative_config=speculation,
        additional_config=job.additional_config or {},
    )
    return llm, SamplingParams(temperature=job.temperature, max_tokens=job.max_tokens)


def _generate(llm: LLM, prompt: Prompt, sampling: SamplingParams, chat: bool | None) -> Response:
    if chat is None:
        chat = bool(getattr(llm.get_tokenizer(), "chat_template", None))
    start = time.perf_counter()
    if chat:
        outputs = llm.chat([{"role": "user", "content": prompt.text}], sampling, use_tqdm=False)
    elif prompt.token_ids is not None:
        outputs = llm.generate({"prompt_token_ids": list(prompt.token_ids)}, sampling, use_tqdm=False)
    else:
        outputs = llm.generate(prompt.text, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    completion = outputs[0].outputs[0]
    return Response(prompt, completion.text, tuple(completion.token_ids), seconds)


def acceptance_counts(llm: LLM) -> AcceptanceCounts:
    """vLLM's counters since the engine's start. A counter that is missing is an error, not a zero."""
    counters = {metric.name: metric for metric in llm.get_metrics()}
    prefix = "vllm:spec_decode_num_"
    return AcceptanceCounts(
        drafts=counters[f"{prefix}drafts"].value,
        drafted_tokens=counters[f"{prefix}draft_tokens"].value,
        accepted_tokens=counters[f"{prefix}accepted_tokens"].value,
        accepted_per_position=tuple(counters[f"{prefix}accepted_tokens_per_pos"].values),
    )


def _die_with_parent(connection: Connection) -> None:
    """End this process group, vLLM's own children included, once the parent's end of the pipe closes.

    The parent sends one job and then nothing more, so the only thing left to wait for is its end.
    """

    def watch() -> None:
        connection.poll(None)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="die-with-parent", daemon=True).start()


def serve_job(run: Callable[[Any], Iterator[Any]]) -> None:
    """Receive a job over the inherited file descriptor argv[1] and send the messages of `run` back."""
    # An exit instead of a sudden death lets vLLM end its own children and give back its shared memory.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    connection = Connection(int(sys.argv[1]))
    job = connection.recv()
    _die_with_parent(connection)
    for message in run(job):
        connection.send(message)


if __name__ == "__main__":
    serve_job(run_job)
