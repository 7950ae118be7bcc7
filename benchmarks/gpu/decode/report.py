# SPDX-License-Identifier: Apache-2.0
"""The report of decode_gpu.py, in markdown."""

from __future__ import annotations

import itertools
import statistics

from gpu.decode.prompts import TAIL
from gpu.decode.trace import profile_table
from gpu.decode.workload import Workload
from gpu.names import NONE, OURS, OWN, TREE, Record, base, label


def markdown(workload: Workload, result: Record) -> str:
    """The whole report of a run, as far as it came."""
    args = workload.args
    names = list(args.engines)
    lines = heading(workload, result)
    lines += [engine_line(name, result["engines"][name]) for name in names if name in result["engines"]]
    for at in itertools.product(args.contexts, args.temperature):
        points = [point for point in result["points"] if (point["context"], point["temperature"]) == at]
        if points:
            lines += ["", *table(workload, names, points)]
    if result["draft_graphs"]:
        lines += ["", *draft_graph_table(result["draft_graphs"])]
    for profile in result["profiles"]:
        lines += ["", "```", profile_table(profile), "```"]
    return "\n".join(lines) + "\n"


def heading(workload: Workload, result: Record) -> list[str]:
    args = workload.args
    kind = "real acceptance" if args.real else f"acceptance length fixed at {args.acceptance}"
    if args.arrivals:
        kind += f", requests that come and go for {args.arrivals:g} s a turn"
    temperatures = " and ".join(f"{temperature:g}" for temperature in args.temperature)
    model = f"The pair in `{args.pair}`" if args.pair else "Qwen3-8B's shape, a 5-layer drafter, random weights"
    return [
        f"# Decode steps on {result['hardware']}",
        "",
        f"{result['date']}, {', '.join(f'{name} {number}' for name, number in result['versions'].items())}.",
        f"{model}, K = {workload.k}, {kind}, temperature {temperatures}, {args.output_tokens} tokens out; "
        "engines in turn, in changing order; "
        f"{args.rounds} rounds and more for {args.point_seconds:g} s at each point.",
        "",
        f"    {result['command']}",
        "",
    ]


def engine_line(name: str, facts: Record) -> str:
    sizes = facts["capture_sizes"]
    graphs = f"CUDA graphs {facts['cudagraph_mode']} up to {max(sizes)} rows" if sizes else "no CUDA graphs"
    drafter = f", drafting with `{facts['drafter']}`" if facts["drafter"] else ""
    start = f"up in {facts['seconds']} s"
    return f"- {label(name)}: {facts['runner']} runner, {facts['attention']}, {graphs}{drafter}; {start}"


def table(workload: Workload, names: list[str], points: list[Record]) -> list[str]:
    """In markdown, of one context and temperature: a row for each number of requests."""
    context, temperature = points[0]["context"], points[0]["temperature"]
    shared = f" All but the last {TAIL} tokens of the prompts are shared, through the prefix cache."
    ratio = {OWN, OURS} <= set(names)
    heads = ["requests", *(f"{label(name)}: ms/step, tokens/s" for name in names)]
    heads += ["step: ours / vLLM's own (min-max)"] if ratio else []
    heads += [f"{label(name)} to no speculation" for name in names if name != NONE and NONE in names]
    heads += ["acceptance length", "differing outputs"] if workload.args.real else []
    heads += ["SM clock, MHz"] if clocked(points) else []
    at = f", temperature {temperature:g}" if len(workload.args.temperature) > 1 else ""
    lines = [f"**{context} tokens in{at}.**{shared if workload.shares(context) else ''} Medians over the rounds.", ""]
    lines += ["| " + " | ".join(heads) + " |", "|" + "--:|" * len(heads)]
    lines += ["| " + " | ".join(point_cells(workload, names, point)) + " |" for point in points]
    note = ["", "`*`: too few steps with all requests running, so steps of the end are in it."]
    return lines + (note if any("*" in line for line in lines[4:]) else [])


def point_cells(workload: Workload, names: list[str], point: Record) -> list[str]:
    count, rounds = point["requests"], point["rounds"]
    rates = {name: [rate(workload, name, answers, count) for answers in rounds] for name in names}
    cells = [str(count)]
    for name in names:
        step = statistics.median(answers[name]["ms_step"] for answers in rounds)
        short = "" if all(answers[name]["steady"] for answers in rounds) else "*"
        cells.append(f"{step:.2f}{short}, {statistics.median(rates[name]):.0f}")
    if {OWN, OURS} <= set(names):
        ratios = [answers[OURS]["ms_step"] / answers[OWN]["ms_step"] for answers in rounds]
        cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")
    if NONE in names:
        for name in (name for name in names if name != NONE):
            ratios = [mine / none for mine, none in zip(rates[name], rates[NONE], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f}")
    if workload.args.real:
        compared = f"{point['differing']} of {point['compared']}" if "compared" in point else "not compared"
        cells += [real_lengths(names, rounds), compared]
    if clocked([point]):
        cells.append(", ".join(f"{median_clock(rounds, name):.0f}" for name in names))
    return cells


def clocked(points: list[Record]) -> bool:
    """Does every turn of these points know the card's clock?"""
    return all("sm_mhz" in answer for point in points for answers in point["rounds"] for answer in answers.values())


def median_clock(rounds: list[dict[str, Record]], name: str) -> float:
    return statistics.median(answers[name]["sm_mhz"] for answers in rounds)


def rate(workload: Workload, name: str, answers: dict[str, Record], count: int) -> float:
    """Tokens per second in the steady region; with synthetic acceptance, at exactly that acceptance."""
    if workload.args.arrivals:
        return float(answers[name]["tokens_s"])
    measured = workload.args.real or base(name) in (NONE, TREE)
    length = answers[name]["length"] if measured else workload.args.acceptance
    return 1000 * count * length / answers[name]["ms_step"]


def real_lengths(names: list[str], rounds: list[dict[str, Record]]) -> str:
    """Acceptance lengths by vLLM's counters, pooled over the rounds: own and ours read the same text, so they agree."""
    lengths = {}
    for name in names:
        drafts = sum(answers[name].get("drafts", 0) for answers in rounds)
        if drafts:
            lengths[name] = 1 + sum(answers[name]["accepted"] for answers in rounds) / drafts
    text = ", ".join(f"{name} {length:.3f}" for name, length in lengths.items())
    if set(lengths) == {OWN, OURS} and abs(lengths[OURS] / lengths[OWN] - 1) > 0.03:
        text += " (APART)"
    return text


def draft_graph_table(records: list[Record]) -> list[str]:
    """The drafting step's graph, replayed by itself, beside the time in which its weights can be read."""
    lines = ["**The drafting step's CUDA graph**, replayed 50 times. Its floor: its weights at copy bandwidth.", ""]
    lines += ["| requests | engine | ms | weights, GB | copy, TB/s | to its floor |", "|--:|--|--:|--:|--:|--:|"]
    for record in records:
        floor = record["weight_bytes"] / record["copy_bytes_per_second"] * 1000
        lines.append(
            f"| {record['requests']} | {label(record['engine'])} | {record['ms']:.3f} | "
            f"{record['weight_bytes'] / 1e9:.2f} | {record['copy_bytes_per_second'] / 1e12:.2f} | "
            f"{record['ms'] / floor:.2f} |"
        )
    return lines
