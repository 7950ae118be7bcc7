# SPDX-License-Identifier: Apache-2.0
"""Tokens a second of draft trees on a large target, MODELLED from what a small trained pair drafts and accepts.

    python benchmarks/decode_gpu.py --requests 1,8,32,64,128 --contexts 512 --engines none,own,tree:auto \
        --save shape.json
    python benchmarks/modelled_trees.py --pair DIR --shape shape.json --temperature 0,1

No large trained pair can be had where there is no network, so three measurements are put together:

1. The trained pair in DIR, with trees of 63 nodes: every tree's likelihoods and which of its nodes the target accepted,
   on held-out prompts. Of a tree's first n nodes the same way is accepted as far as it goes, so this tells what any
   smaller tree would have given. Chains are measured by an engine of their own.
2. The large shape with random weights: what steps of so many rows take, as the engine whose trees follow the load
   measures it at start-up.
3. Steps on that shape: of no speculation, of vLLM's own dflash if it is there, and of that engine, which with random
   weights drafts nothing. So where drafting does not pay, its steps are measured, the drafter's context and all. What a
   step without speculation takes beyond (2) is taken for the overhead of every other step.

(2) and (3) are in what decode_gpu.py saves: of several such files, say of different cards, each has its own rows.

A batch of R requests is R recorded trees drawn at random. What it yields is counted, not expected: accepted nodes among
those that the threshold lets through.

--save keeps (1), and --measured reads it again, which needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import decode_gpu
import numpy as np
from gpu.decode.child import serve
from gpu.decode.job import engine_job
from gpu.decode.workload import Workload
from gpu.engine_process import environment, started_engines
from gpu.machine import run_facts
from gpu.names import NONE, OWN, Record

from vllm_dflash.budget import StepCosts, choose
from vllm_dflash.files import write_whole

RECORDED, CHAIN, LARGE = "tree:63", "ours", "tree:auto"
DRAWS, DRAWN_TREES = 200, 40_000  # batches for each number of requests, and trees, at least


def main() -> None:
    args = parse_arguments()
    shapes = [json.loads(file.read_text()) for file in args.shape]
    measured = json.loads(args.measured.read_text()) if args.measured else measure(args)
    if args.save is not None:
        write_whole(args.save, json.dumps(measured) + "\n")
    text = report(shapes, measured)
    print(text)
    if args.output is not None:
        write_whole(args.output, text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pair", type=Path, help="folder with target/, drafter/ and heldout.jsonl")
    source.add_argument("--measured", type=Path, metavar="JSON", help="what --save kept: measure nothing")
    parser.add_argument(
        "--shape",
        type=Path,
        required=True,
        nargs="+",
        help="decode_gpu.py's --save: none, tree:auto, and own if it fits",
    )
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=192)
    parser.add_argument("--temperature", type=decode_gpu.parse_temperatures, default=(0.0,), metavar="0,1")
    parser.add_argument("--start-timeout", type=float, default=420.0)
    parser.add_argument("--output", type=Path, help="write the report there (markdown)")
    parser.add_argument("--save", type=Path, metavar="JSON", help="keep what was measured there")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> Record:
    """Of the pair, as JSON has it."""
    return run_facts() | {"pair": str(args.pair), "temperatures": measure_pair(args)}


def report(shapes: Sequence[Record], measured: Record) -> str:
    """All tables."""
    points = [(point, costs_of(shape)) for shape in shapes for point in shape["points"]]
    points.sort(key=lambda of_point: int(of_point[0]["requests"]))
    parts = [heading(measured, shapes)]
    for found in measured["temperatures"]:
        records, chain_length = found["records"], found["chain_length"]
        rows = [modelled(point, records, chain_length, costs) for point, costs in points]
        parts.append(section(found["temperature"], rows, records, chain_length))
    return "\n".join(parts)


def workload_of(args: argparse.Namespace) -> Workload:
    """As decode_gpu.py would have it."""
    given = ["--engines", f"{RECORDED},{CHAIN}", "--requests", str(args.prompts), "--contexts", "512"]
    given += ["--dtype", "bfloat16", "--output-tokens", str(args.output_tokens), "--pair", str(args.pair), "--real"]
    given += ["--engine-args", '{"gpu_memory_utilization": 0.05}']
    return Workload(decode_gpu.parse_arguments(given), Path(tempfile.mkdtemp(prefix="modelled-trees-")))


def ask_engines(
    args: argparse.Namespace, workload: Workload, requests: list[dict[str, Record]]
) -> list[dict[str, Record]]:
    """One answer of each engine to each of these. They are side by side only while they start."""
    names = workload.args.engines
    jobs, environments = {n: engine_job(n, workload) for n in names}, {n: environment(n) for n in names}
    folder = Path(tempfile.mkdtemp(prefix="modelled-trees-"))
    with started_engines(jobs, __file__, environments, folder, args.start_timeout) as (engines, _):
        return [{name: engines[name].ask(request[name], 300.0) for name in names} for request in requests]


def measure_pair(args: argparse.Namespace) -> list[Record]:
    """At each temperature recorded trees, and the acceptance length of chains of the same prompts."""
    workload = workload_of(args)
    prompts = workload.prompts(256, args.prompts, seed=0)
    batches = [workload.request(prompts, temperature) | {"counters": True} for temperature in args.temperature]
    answers = ask_engines(args, workload, [{RECORDED: batch | {"record": True}, CHAIN: batch} for batch in batches])
    return [
        {
            "temperature": temperature,
            "records": records_of(answer[RECORDED]),
            "chain_length": length_of(answer[CHAIN]),
        }
        for temperature, answer in zip(args.temperature, answers, strict=True)
    ]


def records_of(recorded: Record) -> list[Record]:
    """Trees and the ways through them. Raises SystemExit where these do not belong together."""
    records: list[Record] = recorded["records"]
    if recorded["odd"] > len(records) / 20:
        raise SystemExit(f"{recorded['odd']} ways do not belong to the trees before them: nothing can be modelled")
    return records


def length_of(chain: Record) -> float:
    """Acceptance length."""
    return 1 + float(chain["accepted"]) / chain["drafts"]


def costs_of(shape: Record) -> StepCosts:
    """What steps of the large shape take. Raises SystemExit where nobody has measured it."""
    found = shape.get("costs", {}).get(LARGE)
    if not found:
        raise SystemExit(f"--shape: no {LARGE} in {shape['command']!r}, which measures what steps cost")
    return StepCosts(**{name: np.array(value) if isinstance(value, list) else value for name, value in found.items()})


def modelled(point: Record, records: list[Record], chain_length: float, costs: StepCosts) -> Record:
    """Tokens a second of each setting at one number of requests."""
    num_reqs, context = point["requests"], float(point["requests"] * point["context"])
    engines = [name for name in (NONE, OWN, LARGE) if all(name in turn for turn in point["rounds"])]
    step_ms = {n: float(np.median([turn[n]["ms_step"] for turn in point["rounds"]])) for n in engines}
    parts_ms = costs.gpu_ms(num_reqs, num_reqs, context, drafts=False)
    without, overhead = (max(0.0, step_ms[name] - parts_ms) for name in (LARGE, NONE))
    costs = costs.with_overheads((without, overhead), (0.0, 0.0))
    result = {"requests": num_reqs, "no speculation": 1000 * num_reqs / step_ms[NONE]}
    if OWN in step_ms:
        result["vLLM's own"] = 1000 * num_reqs * chain_length / step_ms[OWN]
    for num_nodes in (7, 15, 31, 63):
        length = 1 + np.mean([sum(node < num_nodes for node in record["accepted"]) for record in records])
        if num_reqs * (1 + num_nodes) < len(costs.verify_ms):
            ms = costs.step_ms(num_reqs * (1 + num_nodes), num_reqs, context, drafts=True)
            result[f"tree {num_nodes}"] = 1000 * num_reqs * length / ms
    return result | follow_the_load(num_reqs, context, records, costs)


def follow_the_load(num_reqs: int, context: float, records: list[Record], costs: StepCosts) -> Record:
    """The same with a budget for each batch, shared out by one threshold.

    Whether anything is drafted is decided before the trees are there, so by what all of them give on average. (An
    engine, which knows no more than its last trees, also drafts while these are better than that.)
    """
    rng, tokens, seconds, nodes = random.Random(num_reqs), 0.0, 0.0, 0
    num_draws = max(DRAWS, DRAWN_TREES // num_reqs)
    batches = [rng.choices(records, k=num_reqs) for _ in range(num_draws)]
    trees = [np.sort(np.concatenate([record["likelihoods"] for record in batch]))[::-1] for batch in batches]
    choices = [choose(likelihoods, num_reqs, num_reqs, num_reqs, context, costs) for likelihoods in trees]
    drafts = bool(np.mean([choice.gain for choice in choices]) >= 0.0)
    for batch, likelihoods, choice in zip(batches, trees, choices, strict=True):
        budget = choice.budget if drafts else 0
        threshold = likelihoods[budget - 1] if budget else 2.0
        accepted = sum(sum(record["likelihoods"][node] >= threshold for node in record["accepted"]) for record in batch)
        tokens, nodes = tokens + num_reqs + accepted, nodes + budget
        seconds += costs.step_ms(num_reqs + budget, num_reqs, context, drafts) / 1000
    return {"auto": tokens / seconds, "auto's nodes a request": nodes / num_draws / num_reqs}


def heading(measured: Record, shapes: Sequence[Record]) -> str:
    commands = "\n".join(f"    {found['command']}" for found in (*shapes, measured))
    return f"""# MODELLED tokens/s of draft trees at the scale of Qwen3-8B, {measured["hardware"]}

{measured["date"]}. Trees and acceptance of the pair in `{measured["pair"]}`.
Steps of no speculation, of vLLM's own, and of "auto" where it drafts nothing are measured; all else is put together, as
the script's text tells.

{commands}
"""


def section(temperature: float, rows: list[Record], records: list[Record], chain_length: float) -> str:
    """One temperature."""
    lengths = {n: 1 + np.mean([sum(node < n for node in r["accepted"]) for r in records]) for n in (7, 31, 63)}
    of_trees = ", ".join(f"{length:.2f} of {n} nodes" for n, length in lengths.items())
    trees = f"{len(records)} recorded trees: acceptance length {chain_length:.2f} of chains, {of_trees}."
    lines = [f"## Temperature {temperature:g}", "", trees, ""]
    names, peers = list(max(rows, key=len)), ("vLLM's own", "no speculation")
    lines += ["| " + " | ".join([*names, "auto / vLLM's own", "auto / none"]) + " |", "|" + "--:|" * (len(names) + 2)]
    for row in rows:
        cells = [f"{row[name]:.{1 if 'nodes' in name else 0}f}" if name in row else "-" for name in names]
        ratios = [f"{row['auto'] / row[name]:.2f}" if name in row else "-" for name in peers]
        lines.append("| " + " | ".join(cells + ratios) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        serve(Connection(int(sys.argv[2])))
    else:
        main()
