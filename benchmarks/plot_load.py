# SPDX-License-Identifier: Apache-2.0
"""A picture of what decode_gpu.py measured with --arrivals: tokens/s to no speculation, by the number of users.

    python benchmarks/decode_gpu.py --arrivals 2.0 --engines none,own,ours,tree:auto ... --save load.json
    python benchmarks/plot_load.py load.json --engines own,ours,tree:auto --output load.svg

A point is the median of its rounds' ratios, each of two engines that took turns; its line spans all of them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpu.load_points import by_temperature, check_engines, ratios, read_points
from gpu.names import NONE, Record, label, parse_engines

COLOURS = ("#8a8f98", "#3b6fb6", "#b9772a", "#1a8f5f", "#8e4fa8", "#c0392b")


class SpeedUp(NamedTuple):
    """Of one engine with so many users."""

    users: int
    median: float
    least: float
    most: float


def main() -> None:
    args = parse_arguments()
    points = read_points(args.results)
    check_engines(args.results, points, (*args.engines, NONE))
    save(picture(by_temperature(points), args.engines), args.output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what decode_gpu.py --save wrote, with the engine none among others")
    parser.add_argument(
        "--engines", type=parse_engines, default=("own", "ours", "tree:auto"), metavar="own,ours,tree:auto"
    )
    parser.add_argument("--output", type=Path, default=Path("load.svg"), help=".svg or .png")
    return parser.parse_args()


def speed_ups(points: Sequence[Record], engine: str) -> list[SpeedUp]:
    """By the number of users."""
    found = []
    for point in points:
        of_rounds = ratios(point, engine, NONE)
        found.append(SpeedUp(point["requests"], statistics.median(of_rounds), min(of_rounds), max(of_rounds)))
    return found


def picture(points: Mapping[float, Sequence[Record]], names: Sequence[str]) -> Any:
    """A panel for each temperature; a matplotlib Figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.8 + 4.2 * len(points), 3.4), facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(points), squeeze=False)[0]
    for panel, (temperature, its_points) in zip(panels, points.items(), strict=True):
        draw(panel, its_points, names)
        panel.set_title(f"temperature {temperature:g}", loc="left", fontsize=10)
    panels[0].set_ylabel("tokens/s to no speculation")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    return figure


def draw(panel: Any, points: Sequence[Record], names: Sequence[str]) -> None:
    users = [up.users for up in speed_ups(points, NONE)]
    panel.axhline(1.0, color="#333333", linewidth=0.8, linestyle=":")
    for number, name in enumerate(names):
        ups, colour = speed_ups(points, name), COLOURS[number % len(COLOURS)]
        # Beside each other, so that lines do not hide lines.
        places = [place + 0.06 * (number - (len(names) - 1) / 2) for place in range(len(users))]
        panel.plot(places, [up.median for up in ups], color=colour, marker="o", markersize=5, label=label(name))
        panel.vlines(places, [up.least for up in ups], [up.most for up in ups], color=colour, linewidth=1.2, alpha=0.6)
    panel.set_xticks(range(len(users)), [str(number) for number in users])
    panel.set_xlabel("users")
    panel.set_ylim(bottom=0.0)
    panel.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def save(figure: Any, output: Path) -> None:
    """The same results are the same file: an SVG's ids would be random, and it would be dated."""
    import matplotlib

    undated: dict[str, Any] = {"metadata": {"Date": None}} if output.suffix == ".svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": output.stem}):
        figure.savefig(output, bbox_inches="tight", **undated)


if __name__ == "__main__":
    main()
