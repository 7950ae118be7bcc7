# SPDX-License-Identifier: Apache-2.0
"""The child of decode_gpu.py: an engine that answers the parent's requests."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from gpu.cores import keep_to
from gpu.decode.batch import run_batch, steady_region
from gpu.decode.draft_graph import time_draft_graph
from gpu.decode.load import Load, run_load
from gpu.decode.trace import Trace
from gpu.decode.tree_record import measured_costs, record_trees
from gpu.engine_child import start_engine
from gpu.engine_inside import read_counters
from gpu.names import Record


def serve(connection: Connection) -> None:
    """Start an engine, then answer requests until the parent is gone."""
    llm, _ = start_engine(connection)
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        connection.send(answer(llm, request))


def answer(llm: Any, request: Record) -> Record:
    """What a request asks for: a figure of the engine, a time of load, or else a batch."""
    if request.get("cores"):
        keep_to(request["cores"])
    if "draft_graph" in request:
        return time_draft_graph(llm, request["draft_graph"])
    if request.get("costs"):
        return measured_costs(llm)
    if request.get("record"):
        return record_trees(llm, request)
    if "load" in request:
        return counted(llm, lambda: run_load(llm, request["prompts"], Load(**request["load"])))
    return counted(llm, lambda: batch_answer(llm, request)) if request["counters"] else batch_answer(llm, request)


def batch_answer(llm: Any, request: Record) -> Record:
    """Run one batch of prompts to its end: token ids, and what a step of the steady region took."""
    trace = Trace(llm, request["trace"]) if request.get("trace") else None
    steps, token_ids = run_batch(
        llm, request["prompts"], request["max_tokens"], request["temperature"], trace.step if trace else None
    )
    result: Record = {"token_ids": token_ids} | steady_region(steps, len(request["prompts"]))
    return result | ({"profile": trace.summary()} if trace else {})


def counted(llm: Any, run: Callable[[], Record]) -> Record:
    """What a run gives, and what vLLM counted of its drafts, if there are any."""
    if llm.llm_engine.vllm_config.speculative_config is None:
        return run()
    before = read_counters(llm)
    result = run()
    drafts, accepted = (now - then for now, then in zip(read_counters(llm), before, strict=True))
    return result | {"drafts": drafts, "accepted": accepted}
