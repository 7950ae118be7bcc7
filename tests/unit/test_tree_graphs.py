# SPDX-License-Identifier: Apache-2.0
"""Which of its two kinds of graphs an engine captures and replays whose trees follow the load. On a GPU: tests/e2e."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
import torch
from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

from vllm_dflash.compat.ownership import TreeShape
from vllm_dflash.compat.trees import store as store_module
from vllm_dflash.compat.trees.graphs import TreeGraphs
from vllm_dflash.compat.trees.store import TreeStore

SHAPE = TreeShape(num_nodes=5, num_depths=3, num_choices=5, is_auto=True)


@pytest.fixture
def trees(monkeypatch: pytest.MonkeyPatch) -> TreeStore:
    monkeypatch.setattr(store_module, "write_verified_rows", lambda *given: None)
    return TreeStore(4, 32, SHAPE, torch.device("cpu"))


def begins_with_trees(
    trees: TreeStore, rows: int, nodes: int, is_whole: bool = True, is_capture: bool = False, is_padding: Any = None
) -> bool:
    """Whether a step of two requests is prepared to verify."""
    batch: Any = SimpleNamespace(
        positions=None, idx_mapping=None, query_start_loc=None, cu_num_logits=None, seq_lens=None, num_reqs=2,
        num_reqs_after_padding=2, num_tokens_after_padding=rows, num_draft_tokens=nodes, max_query_len=6,
        is_padding=is_padding,
    )  # fmt: skip
    trees.begin_step(batch, is_whole, is_capture)
    return trees.step is not None


def test_steps_without_candidates(trees: TreeStore) -> None:
    """They have graphs of their own at the sizes that were captured."""
    assert begins_with_trees(trees, rows=2, nodes=0)
    trees.plain_sizes = frozenset({2})
    assert not begins_with_trees(trees, rows=2, nodes=0)
    assert begins_with_trees(trees, rows=2, nodes=1)
    assert begins_with_trees(trees, rows=8, nodes=0)
    assert begins_with_trees(trees, rows=2, nodes=0, is_capture=True)
    with trees.without_candidates():
        assert not begins_with_trees(trees, rows=2, nodes=0, is_capture=True)
    assert begins_with_trees(trees, rows=2, nodes=0, is_capture=True)


def test_timed_steps_have_no_padding(trees: TreeStore) -> None:
    """Experts would leave its rows out."""
    is_padding = torch.ones(2, dtype=torch.bool)
    begins_with_trees(trees, rows=2, nodes=0, is_padding=is_padding)
    assert is_padding.all()
    with trees.timed():
        begins_with_trees(trees, rows=2, nodes=0, is_padding=is_padding)
    assert not is_padding.any()


class Plain:
    """Graphs of steps without candidates, of one row and of two."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def needs_capture(self) -> bool:
        return True

    def capture(self, model: Any, model_state: Any, *inputs: Any, **options: Any) -> None:
        self.seen.append(("plain", begins_with_trees(model_state.trees, rows=2, nodes=0, is_capture=True), inputs))

    def captured_token_counts(self) -> list[int]:
        return [1, 2]

    def dispatch(self, *batch: int) -> tuple[int, ...]:
        return batch

    def run_fullgraph(self, desc: Any) -> tuple[str, Any]:
        return "plain", desc


def test_both_kinds(trees: TreeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    note = lambda self, model, state, *inputs, **options: seen.append(("all", None, inputs))  # noqa: E731
    monkeypatch.setattr(ModelCudaGraphManager, "capture", note)
    monkeypatch.setattr(ModelCudaGraphManager, "run_fullgraph", lambda self, desc: ("all", desc))
    graphs: Any = object.__new__(TreeGraphs)
    graphs._trees, graphs._plain, graphs._max_full_descs_to_capture = None, Plain(seen), 2
    state = SimpleNamespace(trees=trees)
    graphs.capture(None, state, "buffers")
    assert seen == [("all", None, ("buffers",))] and not trees.plain_sizes  # memory is profiled
    graphs._max_full_descs_to_capture = None
    graphs.capture(None, state, "buffers", use_aux_hidden_state_outputs=True)
    assert seen[2:] == [("plain", False, ("buffers",))] and trees.plain_sizes == {1, 2}
    desc = SimpleNamespace(num_tokens=2, num_active_loras=0)
    assert begins_with_trees(trees, rows=2, nodes=1) and graphs.run_fullgraph(desc) == ("all", desc)
    assert not begins_with_trees(trees, rows=2, nodes=0) and graphs.run_fullgraph(desc) == ("plain", (2, 2, 1, 0))
