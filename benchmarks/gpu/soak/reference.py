# SPDX-License-Identifier: Apache-2.0
"""The reference: the same prompts without speculation, and why a token differs."""

from __future__ import annotations

import contextlib
from multiprocessing.connection import Connection
from typing import Any

from gpu.names import Record

EXPLAINED = 8  # more than two can be equally likely


def serve_reference(connection: Connection, llm: Any) -> None:
    with contextlib.suppress(EOFError):
        while True:
            request = connection.recv()
            if "explain" in request:
                connection.send(likeliest(llm, request["explain"]))
            else:
                connection.send({"token_ids": reference_outputs(llm, request["requests"])})


def reference_outputs(llm: Any, requests: list[Record]) -> list[list[int]]:
    """Greedy outputs of the same prompts: to the same limits, or as long as an aborted one got."""
    sampling = [
        sampling_params(r["max_tokens"] if r["complete"] else len(r["token_ids"]), stop_token_ids=r["stop_token_ids"])
        for r in requests
    ]
    prompts = [{"prompt_token_ids": request["prompt"]} for request in requests]
    return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, sampling, use_tqdm=False)]


def likeliest(llm: Any, prompt: list[int]) -> list[tuple[int, float]]:
    """The EXPLAINED likeliest tokens after the prompt, with their logprobs, descending."""
    output = llm.generate([{"prompt_token_ids": prompt}], sampling_params(1, logprobs=EXPLAINED), use_tqdm=False)[0]
    found = output.outputs[0].logprobs[0].items()
    return sorted(((int(token), entry.logprob) for token, entry in found), key=lambda pair: -pair[1])[:EXPLAINED]


def sampling_params(max_tokens: int, **more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=max_tokens, detokenize=False, **more)
