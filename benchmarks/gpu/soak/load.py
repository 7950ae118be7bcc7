# SPDX-License-Identifier: Apache-2.0
"""The engine under test: requests come, are aborted and end, and its outputs go to the parent."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from typing import Any

from gpu.engine_inside import read_counters
from gpu.names import Record
from gpu.soak.requests import Active, RandomRequests
from gpu.soak.resources import free_blocks, gpu_mib, in_use, rss_mib

SEND_EVERY_S = 1.0


def serve_load(connection: Connection, llm: Any, settings: Record) -> None:
    """Warm up, note what is in use, load, note it again."""
    connection.recv()  # the start signal
    load = Load(llm, settings, connection)
    free = free_blocks(llm)
    load.run(settings["warm_up_seconds"])
    before = load.resources() | {"free_blocks": free}  # blocks from before any load, the rest once warm
    load.run(settings["seconds"])
    load.send(end={"before": before, "after": load.resources()})


class Load:
    """The load, and the loop that steps the engine under it."""

    def __init__(self, llm: Any, settings: Record, connection: Connection) -> None:
        self.llm, self.engine, self.settings, self.connection = llm, llm.llm_engine, settings, connection
        self.random = RandomRequests(settings)
        self.active: dict[str, Active] = {}
        self.outputs: list[Record] = []  # greedy ones, not sent yet
        self.loops, self.level, self.level_until, self.sent_at = 0, 0, 0.0, 0.0
        self.sent, self.checked = 0, 0  # outputs
        self.started = time.monotonic()
        self.counts = {"requests": 0, "finished": 0, "aborted": 0, "sampled": 0, "output_tokens": 0, "most_active": 0}

    def run(self, seconds: float) -> None:
        """Load for so long, then wait until everything has ended."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._arrivals()
            self._loop()
        self.level = 0
        self._drain()

    def _drain(self) -> None:
        while self.active:
            self._loop()
        for _ in range(4):  # a step may still be on its way
            self.engine.step()

    def _loop(self) -> None:
        self.loops += 1
        for name in [name for name, active in self.active.items() if active.is_due(self.loops)]:
            self.engine.abort_request([name])
            self.counts["aborted"] += 1
            self._record(self.active.pop(name), complete=False)
        if self.active:
            self._step()
        else:
            time.sleep(0.005)
        if time.monotonic() - self.sent_at > SEND_EVERY_S:
            self.send()

    def _step(self) -> None:
        for output in self.engine.step():
            active = self.active.get(output.request_id)
            if active is None:  # aborted while the step was on its way
                continue
            active.token_ids += output.outputs[0].token_ids
            self.counts["output_tokens"] += len(output.outputs[0].token_ids)
            if output.finished:
                self.counts["finished"] += 1
                self._record(self.active.pop(output.request_id), complete=True)

    def _arrivals(self) -> None:
        """Towards a number of concurrent requests that changes at random every few seconds, down to none."""
        rng, now = self.random.rng, time.monotonic()
        if now > self.level_until:
            self.level_until = now + rng.uniform(1, 8)
            self.level = rng.choice((0, self.settings["concurrency"], rng.randint(1, self.settings["concurrency"])))
        room = self.level - len(self.active)
        if self.sent - self.checked > self.settings["most_unchecked"]:  # the reference is slower: wait for it
            return
        if room > 0 and rng.random() < 0.5:
            for _ in range(rng.randint(1, min(room, 8))):
                self._add(self.random.request(), aborted=rng.random() < self.settings["aborted_share"])

    def _add(self, request: Record, aborted: bool = False) -> None:
        name = str(self.counts["requests"])
        self.engine.add_request(name, {"prompt_token_ids": request["prompt"]}, sampling_params(request))
        self.active[name] = self.random.activate(request | {"id": name}, self.loops, aborted)
        self.counts["requests"] += 1
        self.counts["sampled"] += request["temperature"] > 0
        self.counts["most_active"] = max(self.counts["most_active"], len(self.active))

    def _record(self, active: Active, complete: bool) -> None:
        if active.request["temperature"] == 0.0 and active.token_ids:
            self.outputs.append(active.request | {"token_ids": active.token_ids, "complete": complete})

    def send(self, **more: Any) -> None:
        """Outputs since the last time, and how it goes."""
        drafts, accepted = read_counters(self.llm)
        progress: Record = self.counts | {
            "seconds": round(time.monotonic() - self.started, 1),
            "active": len(self.active),
            "preemptions": counter(self.llm, "vllm:num_preemptions"),
            "acceptance_length": round(1 + accepted / drafts, 3) if drafts else None,
            "rss_mib": rss_mib(),
            "gpu_allocated_mib": gpu_mib()[0],
        }
        self.connection.send({"outputs": self.outputs, "progress": progress} | more)
        self.sent += len(self.outputs)
        self.outputs, self.sent_at = [], time.monotonic()
        while self.connection.poll():
            self.checked = self.connection.recv()

    def resources(self) -> Record:
        """What is in use between loads. A tiny request first lets the runner hear that all others have ended."""
        self._add({"prompt": self.random.prompt(1), "max_tokens": 1, "temperature": 0.0, "stop_token_ids": []})
        self._drain()
        return in_use(self.llm)


def sampling_params(request: Record) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=request["temperature"],
        max_tokens=request["max_tokens"],
        stop_token_ids=request["stop_token_ids"],
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def counter(llm: Any, name: str) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)
