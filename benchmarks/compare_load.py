# SPDX-License-Identifier: Apache-2.0
"""One engine to all others, of what decode_gpu.py measured with --arrivals: tokens/s as ratios, in markdown.

    python benchmarks/decode_gpu.py --arrivals 2.0 --engines none,own,ours,tree:auto ... --save load.json
    python benchmarks/compare_load.py load.json --of tree:auto

A cell is the geometric mean of its rounds' ratios, and its standard error; the last row's, of all points' rounds. Where
others use the host too, rounds differ much: what lies within two standard errors of 1 is no difference.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from gpu.load_points import ratios, read_points
from gpu.names import Record, label, parse_engines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what decode_gpu.py --save wrote")
    parser.add_argument("--of", default="tree:auto", metavar="tree:auto")
    parser.add_argument("--to", type=parse_engines, metavar="none,own,...", help="default: all others")
    args = parser.parse_args()
    others = args.to or [name for name in measured_engines(args.results) if name != args.of]
    for temperature, points in read_points(args.results, [args.of, *others]).items():
        print("\n".join(table(points, args.of, others, f"temperature {temperature:g}")), end="\n\n")


def measured_engines(results: Path) -> list[str]:
    """In the order of the first round, which is --engines'."""
    points = json.loads(results.read_text())["points"]
    return list(points[0]["rounds"][0]) if points else []


def table(points: Sequence[Record], name: str, others: Sequence[str], title: str) -> list[str]:
    """A row for each number of users, and one of all."""
    lines = [f"**{label(name)} to, {title}:**", ""]
    lines += ["| users | " + " | ".join(map(label, others)) + " |", "|" + "--:|" * (len(others) + 1)]
    columns = {other: [ratios(point, name, other) for point in points] for other in others}
    for number, point in enumerate(points):
        lines.append(row(str(point["requests"]), [columns[other][number] for other in others]))
    return [*lines, row("all", [sum(columns[other], []) for other in others])]


def row(first: str, cells: Sequence[Sequence[float]]) -> str:
    return "| " + " | ".join((first, *map(mean_and_error, cells))) + " |"


def mean_and_error(values: Sequence[float]) -> str:
    """The geometric mean, and what its logarithm's standard error makes of it; a single value has none."""
    logarithms = list(map(math.log, values))
    mean = math.exp(statistics.mean(logarithms))
    if len(values) < 2:
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {mean * statistics.stdev(logarithms) / math.sqrt(len(values)):.2f}"


if __name__ == "__main__":
    main()
