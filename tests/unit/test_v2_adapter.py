# SPDX-License-Identifier: Apache-2.0
"""The V2 adapter's sizes: vLLM compiles models for no more rows than a step has. On a GPU: tests/e2e."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
import torch
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.dp_utils import DPSyncState
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from vllm_dflash.compat import runner_v2
from vllm_dflash.compat.draft_graphs import DraftGraphs
from vllm_dflash.compat.runner_v2 import V2Adapter
from vllm_dflash.proposer.tapped_states import TappedStates

ROWS = 16  # of a block


def scheduler(max_num_seqs: int, max_num_batched_tokens: int) -> Any:
    return SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)


@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_batched_tokens", "most"),
    [
        pytest.param(1024, 8192, 512, id="vllm serve on a large card"),
        pytest.param(40, 8192, 40, id="room for all"),
        pytest.param(40, 639, 39, id="one does not fit"),
        pytest.param(40, 16, 1, id="room for one"),
    ],
)
def test_graphs_of_blocks(
    max_num_seqs: int, max_num_batched_tokens: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: SimpleNamespace(is_first_rank=True, is_last_rank=True))
    monkeypatch.setattr(cudagraph_utils, "current_platform", SimpleNamespace(get_global_graph_pool=lambda: None))
    config: Any = SimpleNamespace(
        compilation_config=CompilationConfig(cudagraph_capture_sizes=[1, 2, 4, 8], max_cudagraph_capture_size=8),
        scheduler_config=scheduler(max_num_seqs, max_num_batched_tokens),
        speculative_config=SimpleNamespace(
            num_speculative_tokens_per_batch_size=None, uses_dynamic_speculative_decoding=lambda: False
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        num_speculative_tokens=63,
    )
    graphs = DraftGraphs(config, torch.device("cpu"), CUDAGraphMode.FULL_DECODE_ONLY, ROWS, own_sizes=True)
    assert graphs.most_requests == most
    captured = graphs._capture_descs[CUDAGraphMode.FULL]
    assert max(desc.num_tokens for desc in captured) == ROWS * most


@pytest.mark.parametrize(("start", "pieces"), [(0, [4, 4, 2]), (3, [4, 3]), (6, [4]), (10, [])])
def test_context_is_injected_in_pieces(start: int, pieces: list[int]) -> None:
    injected: list[tuple[torch.Tensor, tuple[int, int]]] = []
    order: list[str] = []

    def inject(features: torch.Tensor, rows: tuple[int, int]) -> None:
        injected.append((features, rows))
        order.append("this step's")

    adapter: Any = SimpleNamespace(
        backlog=SimpleNamespace(inject=lambda: order.append("of steps before")),
        max_num_tokens=4,
        staged=SimpleNamespace(context_rows=lambda first, end: (first, end)),
        proposer=SimpleNamespace(inject=inject),
    )
    states = [torch.arange(12.0)[:, None], 100 + torch.arange(12.0)[:, None]]
    V2Adapter._inject_from(adapter, TappedStates(states, 10), start)
    assert order == ["of steps before", *["this step's"] * len(pieces)]
    assert [len(features) for features, _ in injected] == pieces
    assert [list(range(*rows)) for _, rows in injected] == [features[:, 0].tolist() for features, _ in injected]
    assert [row for _, rows in injected for row in range(*rows)] == list(range(start, 10))
    assert all((features[:, 1] == features[:, 0] + 100).all() for features, _ in injected)


@pytest.mark.parametrize(("agreed", "expected"), [(6, 6), (1024, 512)])
def test_ranks_pad_blocks_to_what_a_step_can_have(agreed: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target's graph of 1024 rows is for up to 1024 requests, of which no rank can have more than 512."""
    asked: list[Any] = []
    monkeypatch.setattr(runner_v2, "dispatch_cg_and_sync_dp", lambda *given, **options: asked.append((given, options)))
    adapter: Any = SimpleNamespace(
        most_blocks=512, num_query_per_req=ROWS, graphs=None, dp_size=2, dp_rank=0,
        _build_uniform_batch_dp_sync=lambda *given: DraftModelSpeculator._build_uniform_batch_dp_sync(adapter, *given),
    )  # fmt: skip
    sync = DPSyncState(torch.tensor([1024, 1024], dtype=torch.int32), None, eager=False, num_reqs=agreed)
    V2Adapter._dispatch(adapter, 5, sync, eager=False)
    [(given, options)] = asked
    assert given[1:] == (5, ROWS * expected)
    assert options["dp_sync_state"].num_tokens_across_dp.tolist() == [ROWS * expected] * 2


@pytest.mark.parametrize(
    ("num_reqs", "num_tokens", "expected"),
    [(2, 7, (2, 7)), (3, 8, (3, 8)), (4, 4, (3, 3)), (5, 12, (3, 6))],  # 5 requests have 2, 2, 2, 3, 3 rows
)
def test_made_up_batches_of_no_more_requests(num_reqs: int, num_tokens: int, expected: tuple[int, int]) -> None:
    buffers = InputBuffers(8, 16, torch.device("cpu"))
    batch = InputBatch.make_dummy(num_reqs, num_tokens, buffers)
    adapter: Any = SimpleNamespace(most_blocks=3)
    fitting = V2Adapter._that_fits(adapter, batch)
    assert (fitting.num_reqs, fitting.num_tokens) == expected
    assert fitting.idx_mapping.tolist() == list(range(expected[0]))


def test_context_is_written_before_slots_change_hands() -> None:
    """Before a step in which requests end, are preempted, or begin: a session's next input takes slots over."""
    told: list[tuple[bool, bool]] = []
    adapter: Any = SimpleNamespace(
        backlog=SimpleNamespace(before_step=lambda lost, has_rows: told.append((lost, has_rows)))
    )
    nothing = {"finished_req_ids": set(), "preempted_req_ids": None, "scheduled_new_reqs": []}
    for rows, changes in (
        (3, {}),
        (0, {}),
        (3, {"finished_req_ids": {"a"}}),
        (0, {"preempted_req_ids": {"a"}}),
        (5, {"scheduled_new_reqs": ["a"]}),
    ):
        step: Any = SimpleNamespace(total_num_scheduled_tokens=rows, **nothing | changes)
        V2Adapter.before_step(adapter, step)
    assert told == [(False, True), (False, False), (True, True), (True, False), (True, True)]
