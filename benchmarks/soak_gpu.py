# SPDX-License-Identifier: Apache-2.0
"""Minutes of mixed load on one engine with this plugin: are all tokens right, and does everything come back?

    python benchmarks/soak_gpu.py --pair DIR --minutes 10 [--dtype float32] [--attention-backend TRITON_ATTN]

Requests of random length come at random times, up to --concurrency together; some are aborted at a random moment, some
sample at temperature 1. A second engine on the same device, without speculation, answers the greedy ones again, and
every token must be the same, up to the last one of those that were aborted. The pool of KV blocks is too small for the
largest moments, so that requests are preempted too.

At a difference the reference tells how far it sees both tokens behind its likeliest. Where both are closer to that than
--near-tie, rounding decided; those are counted apart. In float32 that is rare. In bfloat16 it is not, though vLLM's
batch-invariant kernels are switched on: a logit has steps of 0.03 to 0.06 there, and three tokens can be as likely.

At the end no request, KV block or GPU memory may be left over. Exit status 1 on a wrong token or a leak. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing.connection
import signal
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from gpu.engine_process import Engine, EngineError, started_engines
from gpu.machine import on_cuda, run_facts
from gpu.names import NONE, OURS, Record
from gpu.output import say
from gpu.soak.child import serve
from gpu.soak.comparison import Comparison
from gpu.soak.job import engine_environment, engine_job
from gpu.soak.resources import leaks

from vllm_dflash.files import write_whole

SHIPPED_PAIR = Path(__file__).resolve().parents[1] / "models" / "tiny-python"
REPORT_EVERY_S = 15.0


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
    parser.add_argument("--near-tie", type=float, help="in logprob; default: 0.001, in bfloat16 0.13")
    parser.add_argument("--allowed-mib", type=float, default=8.0, help="growth of GPU memory that counts as no leak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-timeout", type=float, default=300.0)
    parser.add_argument("--stall-timeout", type=float, default=120.0, help="seconds without an answer that end the run")
    parser.add_argument("--save", type=Path, help="keep the state of the run there (JSON)")
    args = parser.parse_args()
    if not (args.pair / "target" / "config.json").is_file():
        parser.error(f"--pair {args.pair}: no target/config.json there")
    if args.near_tie is None:
        args.near_tie = 0.001 if args.dtype == "float32" else 0.13
    args.block_size = 16 if cuda else 128
    return args


class Soak:
    """One run of this script: forwards what the engine under test has written to the reference, and compares."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, Path(tempfile.mkdtemp(prefix="soak-gpu-"))
        self.comparison = Comparison(args.near_tie, args.stall_timeout)
        self.failures: list[str] = []
        self.facts: dict[str, Record] = {}
        self.progress: Record = {}
        self.end: Record = {}

    def run(self) -> None:
        jobs = {name: engine_job(name, self.args) for name in (OURS, NONE)}
        environments = {name: engine_environment(name, self.args) for name in jobs}
        with started_engines(jobs, __file__, environments, self.folder, self.args.start_timeout) as (engines, facts):
            self.facts = facts
            if not str(facts[OURS]["drafter"]).startswith("vllm_dflash."):
                raise EngineError(f"the engine drafts with {facts[OURS]['drafter']}, not with this plugin")
            engines[OURS].connection.send({})
            self._relay(engines[OURS], engines[NONE])

    def _relay(self, engine: Engine, reference: Engine) -> None:
        """Until both have finished; raises EngineError where one dies or stalls."""
        heard = {engine.name: time.monotonic(), reference.name: time.monotonic()}
        deadline, reported = float("inf"), time.monotonic()
        while time.monotonic() < deadline:
            busy = [e for e in (engine, reference) if (not self.end if e is engine else bool(self.comparison.checking))]
            if self.end and not busy and not self.comparison.waiting:
                return
            multiprocessing.connection.wait([e.connection for e in busy], timeout=0.5)
            for one in busy:
                if one.connection.poll() or one.process.poll() is not None:
                    self._take(one, one.receive(5.0), engine, reference)
                    heard[one.name] = time.monotonic()
                elif time.monotonic() - heard[one.name] > self.args.stall_timeout:
                    one.receive(0.0)  # raises
            if not self.comparison.checking and self.comparison.waiting:
                self.comparison.send(reference)
                heard[reference.name] = time.monotonic()
            if self.end and deadline == float("inf"):
                deadline = time.monotonic() + self.args.drain_seconds
            if time.monotonic() - reported > REPORT_EVERY_S:
                reported = time.monotonic()
                self._say_progress()

    def _take(self, sender: Engine, message: Record, engine: Engine, reference: Engine) -> None:
        if sender is reference:
            self.comparison.take(message["token_ids"], reference)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its load may have ended
                engine.connection.send(self.comparison.counts["checked_requests"])
            return
        self.comparison.waiting += message["outputs"]
        self.progress = message["progress"]
        self.end = message.get("end", {})

    def _say_progress(self) -> None:
        done = self.comparison
        found = {"to_check": len(done.waiting), "wrong": len(done.wrong), "near_ties": len(done.near_ties)}
        say(json.dumps(self.progress | done.counts | found))
        self._save()

    def _save(self) -> None:
        if self.args.save is not None:
            write_whole(self.args.save, json.dumps(self.result(), indent=1) + "\n")

    def result(self) -> Record:
        return run_facts() | {
            "engines": self.facts,
            "load": self.progress,
            **self.comparison.result(),
            "resources": self.end,
            "leaks": leaks(self.end, self.args.allowed_mib),
            "failures": self.failures,
        }

    def report(self) -> int:
        """Print the outcome; returns the exit status."""
        result = self.result()
        self._save()
        for failure in self.failures:
            print(f"FAILED: {failure}", flush=True)
        print(f"\nload: {json.dumps(self.progress)}")
        for when in ("before", "after"):
            print(f"{when}: {json.dumps(self.end.get(when))}")
        print(
            f"checked {result['checked_requests']} requests, {result['checked_tokens']} tokens; "
            f"{result['wrong_requests']} wrong, {result['near_tie_requests']} near ties, "
            f"{result['unchecked_requests']} left unchecked"
        )
        print("leaks: " + ("; ".join(result["leaks"]) or "none"), flush=True)
        print(json.dumps(result), flush=True)
        clean = result["checked_requests"] and not (result["wrong"] or result["leaks"] or self.failures)
        return 0 if clean else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        serve(Connection(int(sys.argv[2])))
    else:
        main()
