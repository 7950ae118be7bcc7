# SPDX-License-Identifier: Apache-2.0
"""What is modelled of trees whose budget follows the load: one request, steps of 1 ms for any rows, and drafting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_dflash.budget import StepCosts

#: Of two nodes 1.1 tokens are expected, and one comes.
RECORD = {"likelihoods": [0.9, 0.2], "accepted": [0]}


@pytest.mark.parametrize(
    ("draft_ms", "tokens_s", "nodes"),
    [
        (0.5, 2 / 1.5 * 1000, 2.0),  # 2.1 expected in 1.5 ms instead of 1 in 1; the two that come are counted
        (1.5, 1000.0, 0.0),  # 2.1 in 2.5 ms: nothing is drafted, and steps take what they take without
    ],
)
def test_drafts_where_they_pay(monkeypatch: pytest.MonkeyPatch, draft_ms: float, tokens_s: float, nodes: float) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from modelled_trees import follow_the_load

    costs = StepCosts(np.ones(9), np.full(2, draft_ms))
    found = follow_the_load(1, 0.0, [RECORD], costs)
    assert found == {"auto": pytest.approx(tokens_s), "auto's nodes a request": nodes}


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *shapes: dict[str, Any]) -> list[list[str]]:
    """Cells of the table's rows, from files."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import modelled_trees

    found = {"temperature": 1.0, "records": [RECORD], "chain_length": 1.5}
    of_run = {"hardware": "a card", "date": "a day", "pair": "a pair", "command": "a command"}
    (tmp_path / "measured.json").write_text(json.dumps(of_run | {"temperatures": [found]}))
    names = [str(tmp_path / f"shape{number}.json") for number, _ in enumerate(shapes)]
    for name, shape in zip(names, shapes, strict=True):
        Path(name).write_text(json.dumps(shape))
    files = {"--measured": "measured.json", "--output": "table.md", "--save": "again.json"}
    given = [part for name, file in files.items() for part in (name, str(tmp_path / file))]
    monkeypatch.setattr("sys.argv", ["modelled_trees.py", *given, "--shape", *names])
    modelled_trees.main()
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads((tmp_path / "measured.json").read_text())
    lines = (tmp_path / "table.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


def shape(auto_ms: float, draft_ms: float, requests: int = 1, **peers_ms: float) -> dict[str, Any]:
    """What is saved of an engine of 1 ms for any rows, half a millisecond more for candidates."""
    costs = {"verify_ms": [1.0] * 9, "draft_ms": [draft_ms] * (requests + 1), "context_ms": 0.0}
    costs |= {"attention_ms": [0.0] * (requests + 1), "profiled_context": 512, "trees_ms": [0.5] * (requests + 1)}
    turn = {name: {"ms_step": ms} for name, ms in ({"tree:auto": auto_ms} | peers_ms).items()}
    points = [{"requests": requests, "context": 0, "rounds": [turn]}]
    return {"command": f"for {requests}", "points": points, "costs": {"tree:auto": costs}}


def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, auto_ms: float, draft_ms: float) -> list[str]:
    """Cells of the one row for one request."""
    return run(monkeypatch, tmp_path, shape(auto_ms, draft_ms, none=1.25, own=3.0))[-1]


@pytest.mark.parametrize("auto_ms", [1.25, 1.3])
def test_nothing_drafted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, auto_ms: float) -> None:
    """Steps of the engine itself."""
    none, *_, auto, nodes, _, to_none = table(monkeypatch, tmp_path, auto_ms, draft_ms=2.5)[1:]
    assert (none, auto, nodes, to_none) == ("800", f"{1000 / auto_ms:.0f}", "0.0", f"{1.25 / auto_ms:.2f}")


def test_the_overhead_is_every_step_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A step without speculation takes 0.25 ms more than the table says of one row; so does one with two tokens, of
    1.5 ms for its rows and 0.5 for drafting."""
    cells = table(monkeypatch, tmp_path, auto_ms=1.3, draft_ms=0.5)
    assert cells[-4:-2] == [f"{2 / 2.25 * 1000:.0f}", "2.0"]


def test_files_of_several_cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows in the order of requests, each by its own costs; vLLM's own did not fit beside two."""
    two = shape(2.0, 9.0, requests=2, none=2.0)
    head, *rows = run(monkeypatch, tmp_path, two, shape(1.25, 9.0, none=1.25, own=3.0))
    assert [row[:3] for row in rows] == [["1", "800", "500"], ["2", "1000", "-"]]
    assert head[2] == "vLLM's own" and rows[1][-2:] == ["-", "1.00"]


def test_costs_that_nobody_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no tree:auto in 'for 1'"):
        run(monkeypatch, tmp_path, shape(1.25, 0.5, none=1.25) | {"costs": {}})
