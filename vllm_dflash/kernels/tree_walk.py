# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The target's way through the trees of a batch, in one launch: `vllm_dflash.tree.walk` over the runner's own rows.

Letters: L verified rows of all requests, R requests, S rows of the runner's state, N nodes, D depths.
"""

from __future__ import annotations

import torch
from vllm.triton_utils import tl, triton

from vllm_dflash.kernels.repeated_launch import RepeatedLaunch

ROOT = tl.constexpr(-1)


def walk_trees(
    said: torch.Tensor,  # [L] int64 the target's token after each row
    tokens: torch.Tensor,  # [L] each row's own; negative: must not be accepted
    cu_num_logits: torch.Tensor,  # [R+1] each request's rows: its root and the first of its candidates
    state_rows: torch.Tensor,  # [R]
    parents: torch.Tensor,  # [S, N] int32; the node before, or -1
    is_node: torch.Tensor,  # [S, N] bool
    way: torch.Tensor,  # [S, D] int32, written: which rows are accepted, the root's being 0
    said_at: torch.Tensor,  # [S, D] int32, written: the target's tokens on this way, at each depth
    num_said: torch.Tensor,  # [S] int32, written: how many of them there are
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the root on to the child that is the target's token, while there is one.

    Returns what is sampled [R, 1+N] int64, zeros behind the last; how many tokens these are [R] int32; and of every row
    where the logits of a chain would be, the row whose logits take that place [L] int64.
    """
    num_reqs, num_nodes, num_depths = len(state_rows), parents.shape[1], way.shape[1]
    sampled = said.new_zeros(num_reqs, 1 + num_nodes)
    num_sampled = torch.empty(num_reqs, dtype=torch.int32, device=said.device)
    rows = torch.empty_like(said)
    if num_reqs:
        _walk_trees_kernel[(num_reqs,)](
            sampled,
            num_sampled,
            rows,
            way,
            said_at,
            num_said,
            said,
            tokens,
            cu_num_logits,
            state_rows,
            parents,
            is_node,
            N=num_nodes,
            D=num_depths,
            BLOCK_N=triton.next_power_of_2(1 + num_nodes),
            num_warps=1,
        )
    return sampled, num_sampled, rows


@RepeatedLaunch
@triton.jit
def _walk_trees_kernel(
    sampled_ptr,  # [R, 1+N]
    num_sampled_ptr,  # [R]
    rows_ptr,  # [L]
    way_ptr,  # [S, D]
    said_at_ptr,  # [S, D]
    num_said_ptr,  # [S]
    said_ptr,  # [L]
    tokens_ptr,  # [L]
    cu_num_logits_ptr,  # [R+1]
    state_rows_ptr,  # [R]
    parents_ptr,  # [S, N]
    is_node_ptr,  # [S, N]
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    request = tl.program_id(0)
    state_row = tl.load(state_rows_ptr + request).to(tl.int64)
    start = tl.load(cu_num_logits_ptr + request).to(tl.int64)
    num_rows = (tl.load(cu_num_logits_ptr + request + 1) - start).to(tl.int32)
    nodes = tl.arange(0, BLOCK_N)
    is_here = (nodes < N) & (nodes < num_rows - 1)
    parents = tl.load(parents_ptr + state_row * N + nodes, mask=is_here, other=-2)
    tokens = tl.load(tokens_ptr + start + 1 + nodes, mask=is_here, other=-1)
    is_here = is_here & (tokens >= 0) & (tl.load(is_node_ptr + state_row * N + nodes, mask=is_here, other=0) != 0)
    tl.store(rows_ptr + start + nodes, start + nodes, mask=nodes < num_rows)
    tl.debug_barrier()  # some of these rows are written again below

    node = ROOT
    depth = 0
    going = 1
    while going == 1:
        said = tl.load(said_ptr + start + 1 + node)
        child = tl.max(tl.where(is_here & (parents == node) & (tokens == said), nodes, -1), axis=0)
        tl.store(sampled_ptr + request * (1 + N) + depth, said)
        tl.store(said_at_ptr + state_row * D + depth, said.to(tl.int32), mask=depth < D)
        tl.store(rows_ptr + start + depth, start + 1 + node)
        if child >= 0:
            tl.store(way_ptr + state_row * D + depth, child + 1)
            node = child
            depth += 1
        else:
            going = 0
    tl.store(num_sampled_ptr + request, depth + 1)
    tl.store(num_said_ptr + state_row, tl.minimum(depth + 1, D))
