# SPDX-License-Identifier: Apache-2.0
"""What decode_gpu.py measured with --arrivals, read back: points of one context, by temperature and number of users."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from gpu.names import Record


def read_points(results: Path) -> list[Record]:
    """As they were measured. Raises SystemExit where there is none, or of several contexts."""
    points: list[Record] = json.loads(results.read_text())["points"]
    contexts = {point["context"] for point in points}
    if len(contexts) != 1:
        raise SystemExit(f"{results}: points of one --contexts are compared, found {sorted(contexts)}")
    return points


def check_engines(results: Path, points: Sequence[Record], names: Iterable[str]) -> None:
    """Raise SystemExit where one of these cannot be compared."""
    for name in names:
        for point in points:
            check(results, point, name)


def by_temperature(points: Iterable[Record]) -> dict[float, list[Record]]:
    """Fewest users first."""
    found = defaultdict(list)
    for point in sorted(points, key=lambda point: (point["temperature"], point["requests"])):
        found[float(point["temperature"])].append(point)
    return dict(found)


def check(results: Path, point: Record, name: str) -> None:
    """Raise SystemExit where an engine has no rate in one of a point's rounds."""
    for number, answers in enumerate(point["rounds"], 1):
        at = f"{point['requests']} users, temperature {point['temperature']:g}, round {number}"
        if name not in answers:
            raise SystemExit(f"{results}: there is no engine {name!r} in {at}")
        if "running" not in answers[name]:
            raise SystemExit(f"{results}: {at} was not measured with --arrivals")
        if math.isnan(answers[name]["tokens_s"]):
            raise SystemExit(f"{results}: {name} had too few steps in {at}: measure for longer than --arrivals said")


def ratios(point: Record, name: str, to: str) -> list[float]:
    """Tokens/s of one engine to another's, of each round."""
    return [answers[name]["tokens_s"] / answers[to]["tokens_s"] for answers in point["rounds"]]
