# SPDX-License-Identifier: Apache-2.0
"""Minutes of mixed load on one engine with this plugin: are all tokens right, and does everything come back?

    python benchmarks/soak_gpu.py --pair DIR --minutes 10 [--dtype float32] [--attention-backend TRITON_ATTN]

Requests of random length come at random times, up to --concurrency together; some are aborted at a random moment, some
sample at temperature 1. A second engine on the same device, without speculation, answers the greedy ones again, and
every token must be the same, up to the last one of those that were aborted. The pool of KV blocks is too small for the
largest moments, so that requests are preempted too.

At a difference the reference tells how far its two likeliest tokens are apart. Where the other engine took the second
of two that are closer than --near-tie, rounding decided; those are counted apart. In float32 that is rare. For bfloat16
vLLM's batch-invariant kernels are switched on.

At the end no request, KV block or GPU memory may be left over. Exit status 1 on a wrong token or a leak. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import multiprocessing.connection
import os
import random
import shlex
import signal
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from decode_gpu import (
    NONE,
    OURS,
    Engine,
    EngineError,
    Record,
    die_with_parent,
    drafter_of,
    engine_facts,
    environment,
    hardware,
    model_runner,
    on_cuda,
    read_counters,
    say,
    started_engines,
    versions,
    write_whole,
)

from vllm_dflash.benchmark.metrics import first_difference
from vllm_dflash.benchmark.prompts import load_prompts

SHIPPED_PAIR = Path(__file__).resolve().parents[1] / "models" / "tiny-python"
REFERENCE_BATCH = 96
SEND_EVERY_S = 1.0
REPORT_EVERY_S = 15.0
MIB = 2**20


# ------------------------------------------------------------------------------------------------ the parent's side


def main() -> None:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    soak = Soak(args)
    try:
        soak.run()
    except (EngineError, KeyboardInterrupt, SystemExit) as error:
        soak.failures.append(str(error) or "interrupted")
    sys.exit(soak.report())


def parse_arguments() -> argparse.Namespace:
    cuda = on_cuda()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, default=SHIPPED_PAIR, help="folder with target/, drafter/, heldout.jsonl")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--warm-up-seconds", type=float, default=20.0, help="of the same load, before memory is noted")
    parser.add_argument("--drain-seconds", type=float, default=60.0, help="for the reference to catch up at the end")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--longest-prompt", type=int, default=1500)
    parser.add_argument("--longest-output", type=int, default=300)
    parser.add_argument("--aborted-share", type=float, default=0.2)
    parser.add_argument("--sampled-share", type=float, default=0.2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--attention-backend", help="such as TRITON_ATTN or FLEX_ATTENTION; default: vLLM's choice")
    parser.add_argument("-k", "--k", type=int, help="draft tokens a step; default: all that the block holds")
    parser.add_argument("--kv-tokens", type=int, help="size of the KV pool; default: 512 for each concurrent request")
    parser.add_argument("--prefix-caching", action="store_true")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--engine-args", type=json.loads, default={}, metavar="JSON", help="LLM(...) arguments, both")
    parser.add_argument("--additional-config", type=json.loads, default={}, metavar="JSON", help="for the plugin")
    parser.add_argument("--near-tie", type=float, default=1e-3, help="in logprob")
    parser.add_argument("--allowed-mib", type=float, default=8.0, help="growth of GPU memory that counts as no leak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-timeout", type=float, default=300.0)
    parser.add_argument("--stall-timeout", type=float, default=120.0, help="seconds without an answer that end the run")
    parser.add_argument("--save", type=Path, help="keep the state of the run there (JSON)")
    args = parser.parse_args()
    if not (args.pair / "target" / "config.json").is_file():
        parser.error(f"--pair {args.pair}: no target/config.json there")
    args.block_size = 16 if cuda else 128
    return args


class Soak:
    """One run of this script: forwards what the engine under test has written to the reference, and compares."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, Path(tempfile.mkdtemp(prefix="soak-gpu-"))
        self.target = json.loads((args.pair / "target" / "config.json").read_text())
        self.failures: list[str] = []
        self.wrong: list[Record] = []
        self.near_ties: list[Record] = []
        self.waiting: deque[Record] = deque()  # outputs to be checked
        self.checking: list[Record] = []  # those that the reference is at
        self.counts = {"checked_requests": 0, "checked_tokens": 0}
        self.facts: dict[str, Record] = {}
        self.progress: Record = {}
        self.end: Record = {}

    @property
    def max_model_len(self) -> int:
        k = self.args.k or 15
        return min(self.target["max_position_embeddings"], self.args.longest_prompt + self.args.longest_output + k + 1)

    def run(self) -> None:
        jobs = {OURS: self._job(OURS) | {"load": self._load()}, NONE: self._job(NONE)}
        environments = {name: self._environment(name) for name in jobs}
        with started_engines(jobs, __file__, environments, self.folder, self.args.start_timeout) as (engines, facts):
            self.facts = facts
            if not str(facts[OURS]["drafter"]).startswith("vllm_dflash."):
                raise EngineError(f"the engine drafts with {facts[OURS]['drafter']}, not with this plugin")
            engines[OURS].connection.send({})
            self._relay(engines[OURS], engines[NONE])

    def _job(self, name: str) -> Record:
        args = self.args
        arguments: Record = {
            "model": str(args.pair / "target"),
            "skip_tokenizer_init": True,
            "dtype": args.dtype,
            "max_model_len": self.max_model_len,
            "max_num_seqs": args.concurrency if name == OURS else REFERENCE_BATCH,
            "max_num_batched_tokens": args.max_num_batched_tokens,
            "enable_prefix_caching": args.prefix_caching and name == OURS,
            "disable_log_stats": False,
        }
        tokens = max(args.kv_tokens or 512 * args.concurrency, 2 * self.max_model_len)
        if on_cuda():
            room = tokens if name == OURS else REFERENCE_BATCH * self.max_model_len
            arguments |= {"gpu_memory_utilization": 0.25, "kv_cache_memory_bytes": room * self._token_bytes() + 2**28}
        if args.attention_backend:
            arguments["attention_backend"] = args.attention_backend
        if name == OURS:
            arguments |= {"num_gpu_blocks_override": tokens // args.block_size, "block_size": args.block_size}
            speculation: Record = {"method": "dflash", "model": str(args.pair / "drafter")}
            arguments["speculative_config"] = speculation | ({"num_speculative_tokens": args.k} if args.k else {})
            arguments["additional_config"] = args.additional_config
        return {"llm": arguments | args.engine_args}

    def _token_bytes(self) -> int:
        """KV of one token in target and drafter."""
        configs = [json.loads((self.args.pair / name / "config.json").read_text()) for name in ("target", "drafter")]
        heads = sum(c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"] for c in configs)
        return 2 * heads * (4 if self.args.dtype == "float32" else 2)

    def _load(self) -> Record:
        args, ends = self.args, self.target.get("eos_token_id")
        tokens = [
            t for prompt in load_prompts(args.pair / "heldout.jsonl", sys.maxsize) for t in prompt.token_ids or ()
        ]
        return {
            "tokens": tokens,
            "end_ids": [ends] if isinstance(ends, int) else ends or [],
            "longest_prompt": min(args.longest_prompt, self.max_model_len - 2),
            "longest_output": args.longest_output,
            "concurrency": args.concurrency,
            "aborted_share": args.aborted_share,
            "sampled_share": args.sampled_share,
            "warm_up_seconds": args.warm_up_seconds,
            "seconds": 60 * args.minutes,
            "most_unchecked": 4 * REFERENCE_BATCH,
            "seed": args.seed,
        }

    def _environment(self, name: str) -> dict[str, str]:
        settings = environment(name)
        if self.args.dtype == "float32":  # Triton's own default rounds the operands of fp32 products to TF32
            settings.setdefault("TRITON_F32_DEFAULT", "ieee")
        elif on_cuda():
            settings.setdefault("VLLM_BATCH_INVARIANT", "1")
        if not on_cuda():  # threads of two engines on one core wait for each other most of the time
            cores = sorted(os.sched_getaffinity(0))
            settings.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(cores[0 if name == OURS else -1]))
        return settings

    def _relay(self, engine: Engine, reference: Engine) -> None:
        """Until both have finished; raises EngineError where one dies or stalls."""
        heard = {engine.name: time.monotonic(), reference.name: time.monotonic()}
        deadline, reported = float("inf"), time.monotonic()
        while time.monotonic() < deadline:
            busy = [e for e in (engine, reference) if (not self.end if e is engine else bool(self.checking))]
            if self.end and not busy and not self.waiting:
                return
            multiprocessing.connection.wait([e.connection for e in busy], timeout=0.5)
            for one in busy:
                if one.connection.poll() or one.process.poll() is not None:
                    self._take(one, one.receive(5.0), engine, reference)
                    heard[one.name] = time.monotonic()
                elif time.monotonic() - heard[one.name] > self.args.stall_timeout:
                    one.receive(0.0)  # raises
            if not self.checking and self.waiting:
                self._send(reference)
                heard[reference.name] = time.monotonic()
            if self.end and deadline == float("inf"):
                deadline = time.monotonic() + self.args.drain_seconds
            if time.monotonic() - reported > REPORT_EVERY_S:
                reported = time.monotonic()
                self._say_progress()

    def _take(self, sender: Engine, message: Record, engine: Engine, reference: Engine) -> None:
        if sender is reference:
            for output, expected in zip(self.checking, message["token_ids"], strict=True):
                self._compare(output, expected, reference)
            self.checking = []
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its load may have ended
                engine.connection.send(self.counts["checked_requests"])
            return
        self.waiting += message["outputs"]
        self.progress = message["progress"]
        self.end = message.get("end", {})

    def _send(self, reference: Engine) -> None:
        self.checking = [self.waiting.popleft() for _ in range(min(REFERENCE_BATCH, len(self.waiting)))]
        reference.connection.send({"requests": self.checking})

    def _compare(self, output: Record, expected: list[int], reference: Engine) -> None:
        self.counts["checked_requests"] += 1
        position = first_difference(output["token_ids"], expected)
        self.counts["checked_tokens"] += len(expected) if position is None else position
        if position is None:
            return
        record = {key: output[key] for key in ("id", "complete", "max_tokens")}
        record |= {"prompt_tokens": len(output["prompt"]), "position": position}
        if position < min(len(expected), len(output["token_ids"])):
            got, wanted = output["token_ids"][position], expected[position]
            prompt = output["prompt"] + expected[:position]
            top = reference.ask({"explain": prompt}, self.args.stall_timeout)
            gap = top[0][1] - top[1][1]
            near = gap < self.args.near_tie and {got, wanted} <= {token for token, _ in top}
            record |= {"got": got, "expected": wanted, "reference_top": top, "gap": gap}
        else:
            near = False
            record |= {"got_tokens": len(output["token_ids"]), "expected_tokens": len(expected)}
        (self.near_ties if near else self.wrong).append(record)
        say(f"{'near tie' if near else 'WRONG'}: {json.dumps(record)}")

    def _say_progress(self) -> None:
        found = {"to_check": len(self.waiting), "wrong": len(self.wrong), "near_ties": len(self.near_ties)}
        say(json.dumps(self.progress | self.counts | found))
        if self.args.save is not None:
            write_whole(self.args.save, json.dumps(self.result(), indent=1) + "\n")

    def leaks(self) -> list[str]:
        """What did not come back."""
        if not self.end:
            return ["the load did not run to its end"]
        before, after, found = self.end["before"], self.end["after"], []
        for name in ("unfinished", "scheduler_requests", "output_requests"):
            if after[name]:
                found.append(f"{name}: {after[name]} at the end")
        if after["runner_requests"] > 1:  # the runner hears of the very last one's end with the next step only
            found.append(f"runner_requests: {after['runner_requests']} at the end")
        if after["free_blocks"] != before["free_blocks"]:
            found.append(f"free_blocks: {before['free_blocks']} at the start, {after['free_blocks']} at the end")
        if after["gpu_allocated_mib"] - before["gpu_allocated_mib"] > self.args.allowed_mib:
            found.append(f"GPU memory: {before['gpu_allocated_mib']} MiB warm, {after['gpu_allocated_mib']} at the end")
        return found

    def result(self) -> Record:
        return {
            "command": shlex.join(["python", *sys.argv]),
            "date": date.today().isoformat(),
            "hardware": hardware(),
            "versions": versions(),
            "engines": self.facts,
            "load": self.progress,
            **self.counts,
            "unchecked_requests": len(self.waiting) + len(self.checking),
            "wrong": self.wrong[:50],
            "wrong_requests": len(self.wrong),
            "near_ties": self.near_ties[:50],
            "near_tie_requests": len(self.near_ties),
            "resources": self.end,
            "leaks": self.leaks(),
            "failures": self.failures,
        }

    def report(self) -> int:
        """Print the outcome; returns the exit status."""
        result = self.result()
        if self.args.save is not None:
            write_whole(self.args.save, json.dumps(result, indent=1) + "\n")
        for failure in self.failures:
            print(f"FAILED: {failure}", flush=True)
        print(f"\nload: {json.dumps(self.progress)}")
        for when in ("before", "after"):
            print(f"{when}: {json.dumps(self.end.get(when))}")
        print(
            f"checked {self.counts['checked_requests']} requests, {self.counts['checked_tokens']} tokens; "
            f"{len(self.wrong)} wrong, {len(self.near_ties)} near ties, {result['unchecked_requests']} left unchecked"
        )
        print("leaks: " + ("; ".join(result["leaks"]) or "none"), flush=True)
        print(json.dumps(result), flush=True)
        clean = self.counts["checked_requests"] and not (self.wrong or result["leaks"] or self.failures)
        return 0 if clean else 1


# ------------------------------------------------------------------------------------------ the engine under test


@dataclass
class Active:
    """A request that the engine is at."""

    request: Record
    abort_loop: float  # infinite for one that is not aborted by the clock
    abort_tokens: float  # infinite for one that is not aborted while it writes
    token_ids: list[int] = field(default_factory=list)

    def is_due(self, loop: int) -> bool:
        """Whether it is to be aborted now."""
        return loop >= self.abort_loop or len(self.token_ids) >= self.abort_tokens


class Load:
    """The load, and the loop that steps the engine under it."""

    def __init__(self, llm: Any, settings: Record, connection: Connection) -> None:
        self.llm, self.engine, self.settings, self.connection = llm, llm.llm_engine, settings, connection
        self.rng = random.Random(settings["seed"])
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
        now = time.monotonic()
        if now > self.level_until:
            self.level_until = now + self.rng.uniform(1, 8)
            self.level = self.rng.choice(
                (0, self.settings["concurrency"], self.rng.randint(1, self.settings["concurrency"]))
            )
        room = self.level - len(self.active)
        if self.sent - self.checked > self.settings["most_unchecked"]:  # the reference is slower: wait for it
            return
        if room > 0 and self.rng.random() < 0.5:
            for _ in range(self.rng.randint(1, min(room, 8))):
                self._add(self._random_request(), aborted=self.rng.random() < self.settings["aborted_share"])

    def _random_request(self) -> Record:
        settings, rng = self.settings, self.rng
        return {
            "prompt": self._prompt(rng.randint(1, settings["longest_prompt"])),
            "max_tokens": rng.randint(1, settings["longest_output"]),
            "temperature": 1.0 if rng.random() < settings["sampled_share"] else 0.0,
            "stop_token_ids": settings["end_ids"] if rng.random() < 0.5 else [],
        }

    def _add(self, request: Record, aborted: bool = False) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        name = str(self.counts["requests"])
        sampling = SamplingParams(
            temperature=request["temperature"],
            max_tokens=request["max_tokens"],
            stop_token_ids=request["stop_token_ids"],
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self.engine.add_request(name, {"prompt_token_ids": request["prompt"]}, sampling)
        active = Active(request | {"id": name}, math.inf, math.inf)
        if aborted and self.rng.random() < 0.3:  # perhaps before its first token
            active.abort_loop = self.loops + self.rng.randint(1, 8)
        elif aborted:
            active.abort_tokens = self.rng.randint(1, request["max_tokens"])
        self.active[name] = active
        self.counts["requests"] += 1
        self.counts["sampled"] += request["temperature"] > 0
        self.counts["most_active"] = max(self.counts["most_active"], len(self.active))

    def _prompt(self, length: int) -> list[int]:
        tokens = self.settings["tokens"]
        start = self.rng.randrange(len(tokens))
        return [tokens[(start + i) % len(tokens)] for i in range(length)]

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

    def free_blocks(self) -> int:
        return self.engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def resources(self) -> Record:
        """What is in use between loads. A tiny request first lets the runner hear that all others have ended."""
        self._add({"prompt": self._prompt(1), "max_tokens": 1, "temperature": 0.0, "stop_token_ids": []})
        while self.active:
            self._loop()
        for _ in range(4):
            self.engine.step()
        gc.collect()
        scheduler = self.engine.engine_core.engine_core.scheduler
        allocated, reserved = gpu_mib()
        return {
            "unfinished": self.engine.get_num_unfinished_requests(),
            "scheduler_requests": len(scheduler.requests),
            "output_requests": len(self.engine.output_processor.request_states),
            "runner_requests": runner_requests(model_runner(self.llm)),
            "free_blocks": self.free_blocks(),
            "gpu_allocated_mib": allocated,
            "gpu_reserved_mib": reserved,
            "rss_mib": rss_mib(),
        }


def counter(llm: Any, name: str) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def runner_requests(runner: Any) -> int:
    """Requests that the model runner keeps state for: the V2 runner's table, or the V1 runner's dict."""
    table = getattr(runner, "req_states", None)
    return len(table.req_id_to_index if table is not None else runner.requests)


def rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / MIB, 1)


def gpu_mib() -> tuple[float, float]:
    """Allocated and reserved by this process; zeros without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0.0, 0.0
    torch.cuda.synchronize()
    return round(torch.cuda.memory_allocated() / MIB, 2), round(torch.cuda.memory_reserved() / MIB, 2)


def serve_load(connection: Connection, llm: Any, settings: Record) -> None:
    connection.recv()  # the start signal
    load = Load(llm, settings, connection)
    free = load.free_blocks()
    load.run(settings["warm_up_seconds"])
    before = load.resources() | {"free_blocks": free}  # blocks from before any load, the rest once warm
    load.run(settings["seconds"])
    load.send(end={"before": before, "after": load.resources()})


# ------------------------------------------------------------------------------------------------------ the reference


def serve_reference(connection: Connection, llm: Any) -> None:
    with contextlib.suppress(EOFError):
        while True:
            request = connection.recv()
            if "explain" in request:
                connection.send(top_two(llm, request["explain"]))
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


def top_two(llm: Any, prompt: list[int]) -> list[tuple[int, float]]:
    """The two likeliest tokens after the prompt, with their logprobs."""
    output = llm.generate([{"prompt_token_ids": prompt}], sampling_params(1, logprobs=2), use_tqdm=False)[0]
    found = output.outputs[0].logprobs[0].items()
    return sorted(((int(token), entry.logprob) for token, entry in found), key=lambda pair: -pair[1])[:2]


def sampling_params(max_tokens: int, **more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=max_tokens, detokenize=False, **more)


def serve(connection: Connection) -> None:
    """A child: the engine under test where the job has a load, else the reference."""
    die_with_parent()
    job = connection.recv()
    started = time.perf_counter()
    from vllm import LLM

    llm = LLM(**job["llm"])
    drafter = drafter_of(model_runner(llm))
    connection.send(engine_facts(llm) | {"seconds": round(time.perf_counter() - started, 1)})
    if drafter is not None:
        serve_load(connection, llm, job["load"])
    else:
        serve_reference(connection, llm)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        serve(Connection(int(sys.argv[2])))
    else:
        main()
