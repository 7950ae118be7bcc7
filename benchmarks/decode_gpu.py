# SPDX-License-Identifier: Apache-2.0
"""Decode steps on one GPU: no speculation, vLLM's own dflash and this plugin, taking turns on the same card.

    python benchmarks/decode_gpu.py                    # the shape of Qwen3-8B, random weights, acceptance fixed at 6.0
    python benchmarks/decode_gpu.py --pair DIR --real  # a trained pair (target/, drafter/, heldout.jsonl)

The engines: "none"; "own", vLLM's dflash, of all the block holds or of so many draft tokens ("own:7"); "adaptive", that
with vLLM's adaptive verification; "ours" or "ours:7", this plugin's chains; "paced" or "paced:7", these with prompts
admitted several at once where that pays; "tree:31" or "tree:auto", its draft trees.

One process per engine. They start side by side, those that time their own steps at their start alone, and then compute
one at a time, point by point, so that a card that drifts slows all of them alike. A point is a number of concurrent
requests and a prompt length. What is measured is the steady region of each run: from where every request has output
to where the first one ends; prefill is left out.

Without --real, acceptance is fixed by vLLM's synthetic rejection: equal for both drafters, so the ratio of step times
is the ratio of speeds, and tokens/s are requests * acceptance length / step. With --real, drafts are accepted as they
deserve, outputs of the engines are compared token by token, and tokens/s are counted.

Without --real, prompts of --shared-from tokens and more are one common prefix (in vLLM's prefix cache) and a tail of
their own, because three engines share the card's memory. Attention then reads some blocks for all requests, in every
engine alike.

With --cores N, all engines of a round compute on the same N cores, those of the next round on the next N: cores that
other programs keep busy throughout are then no difference between engines. Traces are taken on the last round's.

With --arrivals, a point is a number of users, each of whom asks again a little after an answer is complete, for answers
of a quarter of --output-tokens up to all of them. Prompts then run beside decode steps, and batches grow and shrink.

--profile 1,32 also traces about 20 steps of one engine at these numbers of requests and prints where the time goes.
The last line is JSON. --save keeps it up to date while the run lasts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from gpu.card import CardMonitor
from gpu.cores import core_groups
from gpu.decode.child import serve
from gpu.decode.job import engine_job
from gpu.decode.report import markdown
from gpu.decode.trace import profile_table
from gpu.decode.turns import orders
from gpu.decode.workload import Workload
from gpu.engine_process import Engine, EngineError, environment, started_engines
from gpu.machine import on_cuda, run_facts
from gpu.names import ENGINES, NONE, OURS, OWN, TREE, Record, base, is_ours, measures_itself, parse_engines
from gpu.output import say

from vllm_dflash.files import write_whole

WARM_UP_TOKENS = 48


def main() -> None:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    bench = Benchmark(args)
    failure: BaseException | None = None
    try:
        bench.run()
    except (EngineError, KeyboardInterrupt, SystemExit) as error:
        failure = error
    bench.report()
    if failure is not None:
        print(f"\nthe run was cut short: {failure}", file=sys.stderr, flush=True)
        sys.exit(1)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=parse_numbers, default=(1, 8, 16, 32, 64, 128), help="concurrent requests")
    parser.add_argument("--contexts", type=parse_numbers, default=(512, 8192), help="prompt tokens")
    parser.add_argument("--output-tokens", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=3, help="turns of every engine at a point, at least")
    parser.add_argument("--point-seconds", type=float, default=10.0, help="short points get more rounds, for so long")
    parser.add_argument("-k", "--k", type=int, help="draft tokens a step; default: all that the block holds")
    parser.add_argument("--dtype", help="default: bfloat16, or what the pair's target says")
    parser.add_argument("--engines", type=parse_engines, default=ENGINES, metavar="none,own,ours,tree:31,...")
    parser.add_argument("--pair", type=Path, help="folder with target/, drafter/ and heldout.jsonl: use its weights")
    parser.add_argument("--real", action="store_true", help="real acceptance on held-out prompts of --pair")
    parser.add_argument(
        "--arrivals", type=float, default=0.0, metavar="SECONDS",
        help="instead of batches, in each turn so many seconds of requests that come and go; --requests are the users",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=parse_temperatures, default=(0.0,), metavar="0,1", help="each at all points"
    )
    parser.add_argument("--acceptance", type=float, default=6.0, help="synthetic acceptance length, without --real")
    parser.add_argument("--shared-from", type=int, default=2048, help="prompts this long share all but their end")
    parser.add_argument("--capture-all", action="store_true", help="CUDA graphs at every step size, for none and own")
    parser.add_argument(
        "--additional-config", type=json.loads, default={}, metavar="JSON", help="for this plugin's engines"
    )
    parser.add_argument("--engine-args", type=json.loads, default={}, metavar="JSON", help="LLM(...) arguments, all")
    parser.add_argument(
        "--draft-graph", type=parse_numbers, default=(), help="also time the drafting step's CUDA graph at these"
    )
    parser.add_argument("--profile", type=parse_numbers, default=(), help="numbers of requests to trace at")
    parser.add_argument("--profile-engine", type=parse_engines, default=(OURS,), metavar="none,own,ours")
    parser.add_argument("--profile-dir", type=Path, default=Path("profile"))
    parser.add_argument(
        "--cores", type=parse_cores, default=[[]], metavar="N", help="that a round's engines share; default: all"
    )
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds; no point starts after it")
    parser.add_argument("--start-timeout", type=float, default=420.0)
    parser.add_argument("--run-timeout", type=float, default=180.0, help="seconds for one run of one engine")
    parser.add_argument("--output", type=Path, help="write the report there (markdown)")
    parser.add_argument("--save", type=Path, help="keep the results so far there (JSON)")
    args = parser.parse_args(arguments)
    if args.real and args.pair is None:
        parser.error("--real needs --pair: random weights have no acceptance worth the name")
    if args.pair is not None and not (args.pair / "target" / "config.json").is_file():
        parser.error(f"--pair {args.pair}: no target/config.json there")
    if args.profile and not on_cuda():
        parser.error("--profile needs a CUDA device")
    if args.profile and not set(args.profile_engine) <= set(args.engines):
        parser.error("--profile-engine names an engine that --engines leaves out")
    if not args.requests and not args.profile:
        parser.error("nothing to do: no --requests and no --profile")
    return args


def parse_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def parse_cores(text: str) -> list[list[int]]:
    try:
        return core_groups(int(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_temperatures(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


class Benchmark:
    """One run of this script."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.started = args, time.monotonic()
        self.folder = Path(tempfile.mkdtemp(prefix="decode-gpu-"))
        self.workload = Workload(args, self.folder)
        self.facts: dict[str, Record] = {}
        self.points: list[Record] = []
        self.profiles: list[Record] = []
        self.draft_graphs: list[Record] = []
        self.costs: dict[str, Record] = {}
        self.card = CardMonitor()

    def run(self) -> None:
        args = self.args
        jobs = {name: engine_job(name, self.workload) for name in args.engines}
        environments = {name: environment(name) for name in args.engines}
        timeout = min(args.start_timeout, args.time_limit)
        engines_up = started_engines(jobs, __file__, environments, self.folder, timeout)
        with self.card, engines_up as (engines, self.facts):
            self._check_drafters()
            self._ask_costs(engines)
            self._time_draft_graphs(engines)
            self._measure_points(engines)
            self._profile(engines)

    def _check_drafters(self) -> None:
        for name, facts in self.facts.items():
            ours = str(facts["drafter"]).startswith("vllm_dflash.")
            if is_ours(name) != ours:
                raise EngineError(f"engine {name!r} drafts with {facts['drafter']}: not what is to be measured")

    def _ask_costs(self, engines: dict[str, Engine]) -> None:
        """What engines of one GPU whose trees follow the load have measured of their steps."""
        if self.args.engine_args.get("tensor_parallel_size", 1) > 1:
            return
        for name in (name for name in engines if base(name) == TREE and measures_itself(name)):
            self.costs[name] = engines[name].ask({"costs": True}, self.args.run_timeout)

    def _measure_points(self, engines: dict[str, Engine]) -> None:
        """Point by point; none is started that would probably not end within --time-limit."""
        points = list(itertools.product(self.args.contexts, self.args.requests, self.args.temperature))
        longest = 0.0
        for index, point in enumerate(points):
            begun = time.monotonic()
            if begun - self.started + longest > self.args.time_limit:
                say(f"--time-limit: {len(points) - index} points are left out")
                break
            self.points.append(self._measure(engines, index, *point))
            self.save()
            longest = max(longest, time.monotonic() - begun)

    def _measure(self, engines: dict[str, Engine], index: int, context: int, count: int, temperature: float) -> Record:
        """Warm-up and all rounds of one point. The engines take turns in changing order."""
        for name, engine in engines.items():
            self._warm_up(name, engine, context, count)
        rounds: list[dict[str, Record]] = []
        outputs: list[dict[str, list[list[int]]]] = []
        begun = time.monotonic()
        for number, order in enumerate(orders(list(engines), seed=index)):
            if number >= self.args.rounds and time.monotonic() - begun > self.args.point_seconds:
                break
            if self.args.arrivals:
                request = self.workload.load(context, count, temperature, turn=number)
            else:
                prompts = self.workload.prompts(context, count, seed=1000 * index + number, turn=number)
                request = self.workload.request(prompts, temperature)
            request["cores"] = self.args.cores[number % len(self.args.cores)]
            answers = {name: self._turn(engines[name], request) for name in order}
            outputs.append({name: answer.pop("token_ids", []) for name, answer in answers.items()})
            rounds.append({name: answers[name] for name in engines})
            at = f"context {context}, {count} requests, temperature {temperature:g}"
            say(f"{at}, round {number + 1}: {round_line(rounds[-1])}")
        point: Record = {"context": context, "requests": count, "temperature": temperature, "rounds": rounds}
        comparable = self.args.real and temperature == 0 and not self.args.arrivals
        return point | (compared(point, outputs) if comparable else {})

    def _turn(self, engine: Engine, request: Record) -> Record:
        """One batch of one engine, or a time of load, and what the card did meanwhile."""
        begun = time.monotonic()
        answer: Record = engine.ask(request, self.args.run_timeout)
        return answer | self.card.between(begun, time.monotonic())

    def _warm_up(self, name: str, engine: Engine, context: int, count: int) -> None:
        prompts = self.workload.prompts(context, count, seed=-1)
        begun = time.monotonic()
        if self.workload.shares(context):  # the prefix enters the cache with one request, the others find it
            engine.ask(self.workload.request(prompts[:1]) | {"max_tokens": 4}, self.args.run_timeout)
        tokens = min(WARM_UP_TOKENS, self.args.output_tokens)
        engine.ask(self.workload.request(prompts) | {"max_tokens": tokens}, self.args.run_timeout)
        say(f"context {context}, {count} requests: {name} warm after {time.monotonic() - begun:.1f} s")

    def _time_draft_graphs(self, engines: dict[str, Engine]) -> None:
        for count in self.args.draft_graph:
            for name in (name for name in engines if name != NONE):
                self._warm_up(name, engines[name], self.args.contexts[0], count)  # the graph's rows are this batch's
                record = engines[name].ask({"draft_graph": count}, self.args.run_timeout)
                self.draft_graphs.append({"engine": name, "requests": count} | record)
                say(f"draft graph: {self.draft_graphs[-1]}")
                self.save()

    def _profile(self, engines: dict[str, Engine]) -> None:
        for name in self.args.profile_engine if self.args.profile else ():
            for count in self.args.profile:
                if time.monotonic() - self.started + 30 > self.args.time_limit:
                    say("--time-limit: no more profiles")
                    return
                self.profiles.append(self._trace(name, engines[name], self.args.contexts[0], count))
                print(profile_table(self.profiles[-1]), flush=True)
                self.save()

    def _trace(self, name: str, engine: Engine, context: int, count: int) -> Record:
        self.args.profile_dir.mkdir(parents=True, exist_ok=True)
        trace = self.args.profile_dir / f"{name}-{count}.json.gz"
        self._warm_up(name, engine, context, count)
        request = self.workload.request(self.workload.prompts(context, count, seed=count))
        request["max_tokens"] = self.workload.longest_output
        answer = engine.ask(request | {"trace": str(trace.resolve())}, self.args.run_timeout)
        return {"engine": name, "requests": count, "context": context, "trace": str(trace)} | answer["profile"]

    def result(self) -> Record:
        return run_facts() | {
            "acceptance": "real" if self.args.real else self.args.acceptance,
            "k": self.workload.k,
            "engines": self.facts,
            "points": self.points,
            "draft_graphs": self.draft_graphs,
            "costs": self.costs,
            "profiles": self.profiles,
            "seconds": round(time.monotonic() - self.started, 1),
        }

    def save(self) -> None:
        if self.args.save is not None:
            write_whole(self.args.save, json.dumps(self.result(), indent=1) + "\n")

    def report(self) -> None:
        text = markdown(self.workload, self.result())
        if self.args.output is not None:
            write_whole(self.args.output, text)
        self.save()
        print("\n" + text, flush=True)
        print(json.dumps(self.result()), flush=True)


def round_line(answers: dict[str, Record]) -> str:
    """What each engine's step took, and how ours compares."""
    text = ", ".join(f"{name} {turn_text(answer)}" for name, answer in answers.items())
    if OWN in answers and OURS in answers:
        text += f"; step ours/own {answers[OURS]['ms_step'] / answers[OWN]['ms_step']:.3f}"
    return text


def turn_text(answer: Record) -> str:
    clock = f" at {answer['sm_mhz']:.0f} MHz" if "sm_mhz" in answer else ""
    return f"{answer['ms_step']:.3f} ms x{answer['length']:.2f}{clock}"


def compared(point: Record, outputs: list[dict[str, list[list[int]]]]) -> Record:
    """How many requests of the point were compared, and of how many the engines' outputs differ."""
    differing = sum(map(differing_requests, outputs))
    if differing:
        say(f"context {point['context']}, {point['requests']} requests: {differing} outputs differ between the engines")
    return {"differing": differing, "compared": point["requests"] * len(outputs)}


def differing_requests(outputs: dict[str, list[list[int]]]) -> int:
    """Requests whose token ids are not the same in all engines."""
    return sum(any(ids != same[0] for ids in same) for same in zip(*outputs.values(), strict=True))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        serve(Connection(int(sys.argv[2])))
    else:
        main()
