# SPDX-License-Identifier: Apache-2.0
"""The picture and the table of requests that come and go, of ratios worked out by hand."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def rates(**tokens_s: float) -> dict[str, Any]:
    return {name: {"tokens_s": value, "running": 8.0} for name, value in tokens_s.items()}


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
    points = plot.by_temperature(plot.read_points(results_of(tmp_path)))
    assert plot.speed_ups(points[0.0], "own") == [(8, 3.0, 1.5, 4.0), (32, 1.5, 1.5, 1.5)]


def test_a_panel_for_each_temperature(plot: ModuleType) -> None:
    pytest.importorskip("matplotlib")
    first, second = plot.picture(plot.by_temperature(POINTS), ["own"]).axes
    assert [panel.get_title(loc="left") for panel in (first, second)] == ["temperature 0", "temperature 1"]
    assert list(first.lines[1].get_ydata()) == [3.0, 1.5]
    assert list(second.lines[1].get_ydata()) == [0.5]


TABLE = """\
**Tokens/s of vLLM's own dflash to those of others, temperature 0:**

| users | no speculation |
|--:|--:|
| 8 | 2.62 ± 0.76 |
| 32 | 1.50 |
| all | 1.98 |

**Tokens/s of vLLM's own dflash to those of others, temperature 1:**

| users | no speculation |
|--:|--:|
| 8 | 0.50 |
| all | 0.50 |

"""


def test_a_table_of_means_and_their_errors(tmp_path: Path) -> None:
    """(3 * 1.5 * 4) ** (1/3) = 2.62; logarithms 1.10, 0.41, 1.39 deviate by 0.504: 2.62 * 0.504 / 3 ** 0.5 = 0.76.

    A single round has no error, nor has the mean of both points, (2.62 * 1.5) ** 0.5.
    """
    done = run("compare_load.py", results_of(tmp_path), "--of", "own")
    assert done.returncode == 0, done.stderr
    assert done.stdout == TABLE


def test_the_mean_of_points_has_their_errors(tmp_path: Path) -> None:
    """1 and 4 are 2 ± 1.39, as logarithms 0.693 ± 0.693; 9 and 4 are 6 ± 2.43, 1.792 ± 0.405.

    Their mean: 12 ** 0.5 = 3.46, and (0.693 ** 2 + 0.405 ** 2) ** 0.5 / 2 = 0.402, of 3.46 1.39.
    """
    points = [
        {
            "context": 1,
            "requests": users,
            "temperature": 0.0,
            "rounds": [rates(none=1, own=own, ours=2) for own in owns],
        }
        for users, owns in ((8, (1, 4)), (1, (9, 4)))
    ]
    done = run("compare_load.py", results_of(tmp_path, points), "--of", "own", "--to", "ours,none")
    assert done.stdout.splitlines()[2:] == [
        "| users | vllm_dflash | no speculation |",
        "|--:|--:|--:|",
        "| 1 | 3.00 ± 1.22 | 6.00 ± 2.43 |",
        "| 8 | 1.00 ± 0.69 | 2.00 ± 1.39 |",
        "| all | 1.73 ± 0.70 | 3.46 ± 1.39 |",
        "",
    ]


def test_all_others_in_the_order_that_was_asked_for(tmp_path: Path) -> None:
    points = [POINTS[0] | {"rounds": [rates(none=10, own=15, ours=30)]}]
    done = run("compare_load.py", results_of(tmp_path, points), "--of", "own")
    assert "| users | no speculation | vllm_dflash |" in done.stdout
    assert "| 32 | 1.50 | 0.50 |" in done.stdout


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
    assert "load.json: there is no engine 'tree:31' in 32 users, temperature 0, round 1" in done.stderr


@pytest.mark.parametrize(
    ("points", "found"), [([], r"\[\]"), ([*POINTS, POINTS[0] | {"context": 512}], r"\[256, 512\]")]
)
def test_points_that_are_no_line(tmp_path: Path, points: list[dict[str, Any]], found: str) -> None:
    done = run("compare_load.py", results_of(tmp_path, points), "--of", "own", "--to", "none")
    assert done.returncode != 0
    assert re.search(f"load.json: points of one --contexts are compared, found {found}", done.stderr)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ({"tokens_s": math.nan, "running": 0.0}, "own had too few steps in 8 users, temperature 0, round 2"),
        ({"ms_step": 3.0}, "8 users, temperature 0, round 2 was not measured with --arrivals"),
    ],
)
def test_rounds_that_cannot_be_compared(tmp_path: Path, answer: dict[str, float], complaint: str) -> None:
    rounds = [rates(none=10, own=15), {"none": {"tokens_s": 10.0, "running": 8.0}, "own": answer}]
    points = [{"context": 1, "requests": 8, "temperature": 0.0, "rounds": rounds}]
    done = run("compare_load.py", results_of(tmp_path, points), "--of", "own")
    assert done.returncode != 0
    assert f"load.json: {complaint}" in done.stderr
