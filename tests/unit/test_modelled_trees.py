# SPDX-License-Identifier: Apache-2.0
"""What is modelled of trees whose budget follows the load: one request, steps of 1 ms for any rows, and drafting."""

from __future__ import annotations

import json
from pathlib import Path

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


def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, auto_ms: float, draft_ms: float) -> list[str]:
    """Cells of the one row for one request, from files."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import modelled_trees

    costs = {"verify_ms": [1.0] * 9, "draft_ms": [draft_ms] * 2, "context_ms": 0.0}
    costs |= {"attention_ms": [0.0] * 2, "profiled_context": 512, "trees_ms": [0.5] * 2}
    found = {"temperature": 1.0, "records": [RECORD], "chain_length": 1.5}
    of_run = {"hardware": "a card", "date": "a day", "pair": "a pair", "command": "a command"}
    (tmp_path / "measured.json").write_text(json.dumps(of_run | {"temperatures": [found], "costs": costs}))
    turns = [{"none": {"ms_step": 1.25}, "own": {"ms_step": 3.0}, "tree:auto": {"ms_step": auto_ms}}]
    (tmp_path / "shape.json").write_text(json.dumps({"points": [{"requests": 1, "context": 0, "rounds": turns}]}))
    files = {"--measured": "measured.json", "--shape": "shape.json", "--output": "table.md", "--save": "again.json"}
    given = [part for name, file in files.items() for part in (name, str(tmp_path / file))]
    monkeypatch.setattr("sys.argv", ["modelled_trees.py", *given])
    modelled_trees.main()
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads((tmp_path / "measured.json").read_text())
    last = (tmp_path / "table.md").read_text().splitlines()[-1]
    return [cell.strip() for cell in last.strip("|").split("|")]


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
