# SPDX-License-Identifier: Apache-2.0
"""The picture and the table of requests that come and go, of ratios worked out by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def rates(**tokens_s: float) -> dict[str, Any]:
    return {name: {"tokens_s": value} for name, value in tokens_s.items()}


POINTS: list[dict[str, Any]] = [
    {"context": 256, "requests": 32, "temperature": 0.0, "rounds": [rates(none=10, own=15)]},
    # 3.0, 1.5 and 4.0, whose median is not that of the medians, 300 / 80.
    {
        "context": 256,
        "requests": 8,
        "temperature": 0.0,
        "rounds": [rates(none=100, own=300), rates(none=80, own=120), rates(none=80, own=320)],
    },
    {"context": 256, "requests": 8, "temperature": 1.0, "rounds": [rates(none=100, own=50)]},
]


@pytest.fixture
def plot(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__("plot_load")


def results_of(folder: Path, points: list[dict[str, Any]] = POINTS) -> Path:
    results = folder / "load.json"
    results.write_text(json.dumps({"points": points}))
    return results


def test_ratios_are_those_of_rounds(plot: ModuleType, tmp_path: Path) -> None:
    points = plot.read_points(results_of(tmp_path), ["own"])
    assert plot.speed_ups(points[0.0], "own") == [(8, 3.0, 1.5, 4.0), (32, 1.5, 1.5, 1.5)]


def test_a_panel_for_each_temperature(plot: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second = plot.picture(plot.read_points(results_of(tmp_path), ["own"]), ["own"]).axes
    assert [panel.get_title(loc="left") for panel in (first, second)] == ["temperature 0", "temperature 1"]
    assert list(first.lines[1].get_ydata()) == [3.0, 1.5]
    assert list(second.lines[1].get_ydata()) == [0.5]


def test_a_table_of_means_and_their_errors(tmp_path: Path) -> None:
    """(3 * 1.5 * 4) ** (1/3) = 2.62; logarithms 1.10, 0.41, 1.39 deviate by 0.504: 2.62 * 0.504 / 3 ** 0.5 = 0.76.

    With 1.5 once more: 27 ** 0.25 = 2.28, and 2.28 * 0.497 / 2 = 0.57.
    """
    done = run("compare_load.py", results_of(tmp_path), "--of", "own")
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout
        == """\
**vLLM's own dflash to, temperature 0:**

| users | no speculation |
|--:|--:|
| 8 | 2.62 ± 0.76 |
| 32 | 1.50 |
| all | 2.28 ± 0.57 |

**vLLM's own dflash to, temperature 1:**

| users | no speculation |
|--:|--:|
| 8 | 0.50 |
| all | 0.50 |

"""
    )


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_same_results_are_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = [tmp_path / folder / "load.svg" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        done = run("plot_load.py", results_of(tmp_path), "--engines", "own", "--output", file)
        assert done.returncode == 0, done.stderr
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_engine_that_was_not_measured(tmp_path: Path) -> None:
    done = run("plot_load.py", results_of(tmp_path), "--engines", "own,tree:31")
    assert done.returncode != 0
    assert "load.json: there is no engine 'tree:31' in all of its points" in done.stderr


@pytest.mark.parametrize(
    ("points", "found"), [([], r"\[\]"), ([*POINTS, POINTS[0] | {"context": 512}], r"\[256, 512\]")]
)
def test_points_that_are_no_line(tmp_path: Path, points: list[dict[str, Any]], found: str) -> None:
    done = run("compare_load.py", results_of(tmp_path, points), "--of", "own", "--to", "none")
    assert done.returncode != 0
    assert re.search(f"load.json: points of one --contexts are compared, found {found}", done.stderr)
