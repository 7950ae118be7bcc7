# SPDX-License-Identifier: Apache-2.0
"""What decode_gpu.py measured with --arrivals, read back: points of one context, by temperature and number of users."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from gpu.names import Record


def read_points(results: Path, names: Iterable[str]) -> dict[float, list[Record]]:
    """By temperature, fewest users first. Raises SystemExit where the file lacks one of these engines."""
    points = json.loads(results.read_text())["points"]
    contexts = {point["context"] for point in points}
    if len(contexts) != 1:
        raise SystemExit(f"{results}: points of one --contexts are compared, found {sorted(contexts)}")
    for name in names:
        if not all(name in answers for point in points for answers in point["rounds"]):
            raise SystemExit(f"{results}: there is no engine {name!r} in all of its points")
    by_temperature = defaultdict(list)
    for point in sorted(points, key=lambda point: (point["temperature"], point["requests"])):
        by_temperature[float(point["temperature"])].append(point)
    return dict(by_temperature)


def ratios(point: Record, name: str, to: str) -> list[float]:
    """Tokens/s of one engine to another's, of each round."""
    return [answers[name]["tokens_s"] / answers[to]["tokens_s"] for answers in point["rounds"]]
