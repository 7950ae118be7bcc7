# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""A budget of nodes shared out between requests by one threshold on their likelihood, in one launch.

Nodes of a request come likeliest first, so those over a threshold are its first ones: a tree again. The threshold is
the budget's last node's likelihood, found by bisection over the bits of fp32, which are ordered as the numbers are.

Letters: R requests, S rows of the runner's state, N nodes of a request.
"""

from __future__ import annotations

import torch
from vllm.triton_utils import tl, triton

from vllm_dflash.kernels.repeated_launch import RepeatedLaunch

_ONE = 0x3F800000  # the bits of 1.0


def share_nodes(
    probs: torch.Tensor,  # [S, N] fp32 from 0 to 1, descending along N
    state_rows: torch.Tensor,  # [R]
    planned: torch.Tensor,  # [2, R] int32 nodes that there is room for, and a request's other rows
    budget: int,  # at most the sum of the first
    cu_num_logits: torch.Tensor,  # [>= R+1] int32, written: a root and its nodes each
    query_start_loc: torch.Tensor,  # [>= R+1] int32, written: all rows; behind R+1 their sum
) -> None:
    """The likeliest nodes of all requests; of equally likely ones, the first requests'."""
    num_reqs, num_nodes = len(state_rows), probs.shape[1]
    assert planned.shape == (2, num_reqs) and planned.is_contiguous(), f"{tuple(planned.shape)}"
    block_reqs, block_nodes = triton.next_power_of_2(num_reqs), triton.next_power_of_2(num_nodes)
    _share_nodes_kernel[(1,)](
        probs,
        state_rows,
        planned,
        cu_num_logits,
        query_start_loc,
        budget,
        num_reqs,
        len(query_start_loc),
        N=num_nodes,
        ONE=_ONE,
        BLOCK_R=block_reqs,
        BLOCK_N=block_nodes,
        BLOCK_Q=triton.next_power_of_2(len(query_start_loc)),
        num_warps=min(32, max(1, block_reqs * block_nodes // 512)),
    )


@RepeatedLaunch
@triton.jit(do_not_specialize=["budget", "num_reqs"])
def _share_nodes_kernel(
    probs_ptr,  # [S, N]
    state_rows_ptr,  # [R]
    planned_ptr,  # [2, R]
    cu_num_logits_ptr,  # [R+1]
    query_start_loc_ptr,  # [num_starts]
    budget,
    num_reqs,
    num_starts,
    N: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    requests = tl.arange(0, BLOCK_R)
    nodes = tl.arange(0, BLOCK_N)
    is_request = requests < num_reqs
    state_rows = tl.load(state_rows_ptr + requests, mask=is_request, other=0).to(tl.int64)
    scheduled = tl.load(planned_ptr + requests, mask=is_request, other=0)
    others = tl.load(planned_ptr + num_reqs + requests, mask=is_request, other=0)
    is_node = nodes[None, :] < scheduled[:, None]
    probs = tl.load(probs_ptr + state_rows[:, None] * N + nodes[None, :], mask=is_node, other=0.0)
    # Rounding may have made a likelihood a little more than one.
    bits = tl.where(is_node, tl.minimum(probs.to(tl.int32, bitcast=True), ONE), -1)

    # The largest threshold that at least `budget` nodes reach.
    low = 0
    high = ONE + 1
    while high - low > 1:
        middle = (low + high) // 2
        if tl.sum(tl.sum((bits >= middle).to(tl.int32), axis=1), axis=0) >= budget:
            low = middle
        else:
            high = middle
    above = tl.sum((bits > low).to(tl.int32), axis=1)
    at = tl.sum((bits == low).to(tl.int32), axis=1)
    left = budget - tl.sum(above, axis=0)
    before = tl.cumsum(at, axis=0) - at
    shared = above + tl.minimum(at, tl.maximum(left - before, 0))

    one = tl.where(is_request, 1, 0)
    tl.store(cu_num_logits_ptr + 1 + requests, tl.cumsum(shared + one, axis=0), mask=is_request)
    starts = tl.cumsum(shared + others, axis=0)
    tl.store(query_start_loc_ptr + 1 + requests, starts, mask=is_request)
    total = tl.sum(shared + others, axis=0)
    behind = tl.arange(0, BLOCK_Q)
    tl.store(query_start_loc_ptr + behind, total, mask=(behind > num_reqs) & (behind < num_starts))
    tl.store(cu_num_logits_ptr, 0)
    tl.store(query_start_loc_ptr, 0)
