# SPDX-License-Identifier: Apache-2.0
"""A budget shared out between requests: against a sort of all nodes, and one batch worked out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dflash.kernels.share_nodes import share_nodes

NOT_WRITTEN = -9


def shared(
    device: str, probs: list[list[float]], state_rows: list[int], scheduled: list[int], others: list[int], budget: int
) -> tuple[list[int], list[int]]:
    """`cu_num_logits` and `query_start_loc`, of room for two requests more."""
    cu_num_logits, query_start_loc = (
        torch.full((len(state_rows) + 3,), NOT_WRITTEN, dtype=torch.int32, device=device) for _ in range(2)
    )
    rows = torch.tensor(state_rows, device=device)
    planned = torch.tensor([scheduled, others], dtype=torch.int32, device=device)
    share_nodes(torch.tensor(probs, device=device), rows, planned, budget, cu_num_logits, query_start_loc)
    return cu_num_logits.tolist(), query_start_loc.tolist()


PROBS = [[0.5, 0.4, 0.1], [0.9, 0.8, 0.7], [0.2, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("budget", "counts"),
    [(0, [0, 0, 0]), (1, [1, 0, 0]), (4, [3, 1, 0]), (6, [3, 2, 1]), (7, [3, 3, 1]), (9, [3, 3, 3])],
)
def test_by_hand(device: str, budget: int, counts: list[int]) -> None:
    """The first request is row 1 of the state; the last one is a prompt's end of four rows beside its nodes."""
    cu_num_logits, query_start_loc = shared(device, PROBS, [1, 0, 2], [3, 3, 3], [1, 1, 4], budget)
    logits = [0, *torch.tensor([1 + count for count in counts]).cumsum(0).tolist()]
    assert cu_num_logits == [*logits, NOT_WRITTEN, NOT_WRITTEN]
    rows = torch.tensor([own + count for own, count in zip([1, 1, 4], counts, strict=True)]).cumsum(0).tolist()
    assert query_start_loc == [0, *rows, rows[-1], rows[-1]]


def test_no_more_than_was_scheduled(device: str) -> None:
    cu_num_logits, _ = shared(device, PROBS, [1, 0, 2], [1, 2, 0], [1, 1, 1], 3)
    assert cu_num_logits[:4] == [0, 2, 5, 6]


def test_a_little_more_than_certain(device: str) -> None:
    """As rounding may have it: then too no more nodes than the budget."""
    certain = 1.0 + 2.0**-16
    cu_num_logits, _ = shared(device, [[certain] * 4, [certain, 1.0, 0.5, 0.1]], [0, 1], [4, 4], [1, 1], 3)
    assert cu_num_logits[:3] == [0, 4, 5]


def test_equally_likely_nodes(device: str) -> None:
    cu_num_logits, _ = shared(device, [[0.5, 0.5], [0.5, 0.5]], [0, 1], [2, 2], [1, 1], 3)
    assert cu_num_logits[:3] == [0, 3, 5]


@settings(max_examples=25, deadline=None)
@given(num_reqs=st.integers(1, 20), num_nodes=st.integers(1, 40), seed=st.integers(0, 999), data=st.data())
def test_as_a_sort(num_reqs: int, num_nodes: int, seed: int, data: st.DataObject) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(num_reqs, num_nodes, generator=generator).sort(dim=1, descending=True).values
    scheduled = torch.randint(0, num_nodes + 1, (num_reqs,), generator=generator)
    budget = data.draw(st.integers(0, int(scheduled.sum())))
    everyone = list(range(num_reqs))
    cu_num_logits, _ = shared(device, probs.tolist(), everyone, scheduled.tolist(), [1] * num_reqs, budget)
    candidates = [(-float(probs[r, n]), r, n) for r in everyone for n in range(int(scheduled[r]))]
    counts = [0] * num_reqs
    for _, request, _ in sorted(candidates)[:budget]:
        counts[request] += 1
    assert cu_num_logits[: num_reqs + 1] == [0, *(torch.tensor(counts) + 1).cumsum(0).tolist()]
