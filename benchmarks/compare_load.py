# SPDX-License-Identifier: Apache-2.0
"""One engine to all others, of what decode_gpu.py measured with --arrivals: tokens/s as ratios, in markdown.

    python benchmarks/decode_gpu.py --arrivals 2.0 --engines none,own,ours,tree:auto ... --save load.json
    python benchmarks/compare_load.py load.json --of tree:auto

A cell is the geometric mean of its rounds' ratios, and its standard error: with three rounds, 4.3 such errors make a
95 % interval. The last row is the geometric mean of the points above, and its error follows from theirs: it is that of
these loads, measured again, and not of others.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu.load_points import by_temperature, check_engines, ratios, read_points
from gpu.names import Record, label, parse_engines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what decode_gpu.py --save wrote")
    parser.add_argument("--of", default="tree:auto", metavar="tree:auto")
    parser.add_argument("--to", type=parse_engines, metavar="none,own,...", help="default: all others")
    args = parser.parse_args()
    points = read_points(args.results)
    # In the order of a round, which is --engines'.
    others = args.to or [name for name in points[0]["rounds"][0] if name != args.of]
    check_engines(args.results, points, [args.of, *others])
    for temperature, its_points in by_temperature(points).items():
        print("\n".join(table(its_points, args.of, others, f"temperature {temperature:g}")), end="\n\n")


def table(points: Sequence[Record], name: str, others: Sequence[str], title: str) -> list[str]:
    """A row for each number of users, and one of all."""
    lines = [f"**Tokens/s of {label(name)} to those of others, {title}:**", ""]
    lines += ["| users | " + " | ".join(map(label, others)) + " |", "|" + "--:|" * (len(others) + 1)]
    columns = [[Estimate.of(ratios(point, name, other)) for point in points] for other in others]
    for number, point in enumerate(points):
        lines.append(row(str(point["requests"]), [column[number] for column in columns]))
    return [*lines, row("all", list(map(Estimate.mean, columns)))]


def row(first: str, cells: Sequence[Estimate]) -> str:
    return "| " + " | ".join((first, *map(str, cells))) + " |"


@dataclass(frozen=True)
class Estimate:
    """A ratio's logarithm, and its standard error; None: a single value has none."""

    logarithm: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The mean of values that were measured alike."""
        logarithms = list(map(math.log, values))
        error = statistics.stdev(logarithms) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.mean(logarithms), error)

    @classmethod
    def mean(cls, parts: Sequence[Estimate]) -> Estimate:
        """Of estimates of different things."""
        errors = [part.error for part in parts if part.error is not None]
        error = math.hypot(*errors) / len(parts) if len(errors) == len(parts) else None
        return cls(statistics.mean(part.logarithm for part in parts), error)

    def __str__(self) -> str:
        ratio = math.exp(self.logarithm)
        return f"{ratio:.2f}" if self.error is None else f"{ratio:.2f} ± {ratio * self.error:.2f}"


if __name__ == "__main__":
    main()
