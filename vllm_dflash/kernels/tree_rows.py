# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Row arithmetic of steps that verify trees: what the target's forward reads, and what of it the drafter reads.

Letters: R requests, P >= R requests after padding, T rows of the step, S rows of the runner's state, N nodes, D depths.
The last rows of a request are a root and the candidates behind it; of a request that verifies nothing, the root alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.triton_utils import tl, triton

from vllm_dflash.kernels.repeated_launch import RepeatedLaunch

_ROWS = 256


@dataclass(frozen=True)
class VerifiedRows:
    """Where the trees of a step are, in memory that stays where it is."""

    state_rows: torch.Tensor  # [P] int32 row of the runner's state; 0 for padding
    first_rows: torch.Tensor  # [P] int32 the roots among the step's rows
    num_rows: torch.Tensor  # [P] int32 a root and its candidates; 0: there are no candidates
    prefix_lens: torch.Tensor  # [P] int32 slots that all verified rows see; without candidates, the root's included
    positions: torch.Tensor  # [T] int64 what RoPE reads

    @classmethod
    def allocate(cls, max_num_reqs: int, max_num_rows: int, device: torch.device) -> VerifiedRows:
        """For steps of up to so many requests and rows."""
        state_rows, first_rows, num_rows, prefix_lens = torch.zeros(4, max_num_reqs, dtype=torch.int32, device=device)
        positions = torch.zeros(max_num_rows, dtype=torch.int64, device=device)
        return cls(state_rows, first_rows, num_rows, prefix_lens, positions)


def write_verified_rows(
    out: VerifiedRows,
    positions: torch.Tensor,  # [T] int64, of the slots
    state_rows: torch.Tensor,  # [R] int32 or int64
    query_start_loc: torch.Tensor,  # [>= R+1] int32
    cu_num_logits: torch.Tensor,  # [R+1] int32
    seq_lens: torch.Tensor,  # [>= R] int32
    depths: torch.Tensor,  # [S, N] int32; 1 right behind the root
    num_reqs: int,  # R
    num_reqs_padded: int,  # P; those behind R get no rows and no prefix
    num_rows: int,  # T
) -> None:
    """Fill the buffers. A candidate stands at its root's position plus its depth."""
    num_nodes = depths.shape[1]
    assert positions.is_contiguous() and depths.is_contiguous() and depths.dtype == torch.int32
    copies = triton.cdiv(num_rows, _ROWS)
    _verified_rows_kernel[(num_reqs_padded + copies,)](
        out.state_rows,
        out.first_rows,
        out.num_rows,
        out.prefix_lens,
        out.positions,
        positions,
        state_rows,
        query_start_loc,
        cu_num_logits,
        seq_lens,
        depths,
        num_reqs,
        num_reqs_padded,
        num_rows,
        N=num_nodes,
        BLOCK_N=triton.next_power_of_2(num_nodes),
        ROWS=_ROWS,
        num_warps=1,
    )


@RepeatedLaunch
@triton.jit(do_not_specialize=["num_reqs", "num_reqs_padded", "num_rows"])
def _verified_rows_kernel(
    out_state_rows_ptr,  # [P]
    out_first_rows_ptr,  # [P]
    out_num_rows_ptr,  # [P]
    out_prefix_lens_ptr,  # [P]
    out_positions_ptr,  # [T]
    positions_ptr,  # [T]
    state_rows_ptr,  # [R]
    query_start_loc_ptr,  # [R+1]
    cu_num_logits_ptr,  # [R+1]
    seq_lens_ptr,  # [R]
    depths_ptr,  # [S, N]
    num_reqs,
    num_reqs_padded,
    num_rows,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    if program >= num_reqs_padded:
        # Everybody's rows but candidates', who write their own.
        rows = (program - num_reqs_padded) * ROWS + tl.arange(0, ROWS)
        is_row = rows < num_rows
        low = tl.zeros([ROWS], tl.int32)
        high = tl.zeros([ROWS], tl.int32) + num_reqs
        while tl.max(high - low, axis=0) > 1:  # whose row is it: the last request that starts at or before it
            middle = (low + high) // 2
            before = tl.load(query_start_loc_ptr + middle) <= rows
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        end = tl.load(query_start_loc_ptr + low + 1)
        num_logits = tl.load(cu_num_logits_ptr + low + 1) - tl.load(cu_num_logits_ptr + low)
        is_candidate = (rows > end - num_logits) & (rows < end)
        tl.store(out_positions_ptr + rows, tl.load(positions_ptr + rows, mask=is_row), mask=is_row & ~is_candidate)
        return
    if program >= num_reqs:
        tl.store(out_state_rows_ptr + program, 0)
        tl.store(out_first_rows_ptr + program, 0)
        tl.store(out_num_rows_ptr + program, 0)
        tl.store(out_prefix_lens_ptr + program, 0)
        return
    state_row = tl.load(state_rows_ptr + program).to(tl.int64)
    num_logits = tl.load(cu_num_logits_ptr + program + 1) - tl.load(cu_num_logits_ptr + program)
    first = tl.load(query_start_loc_ptr + program + 1) - num_logits
    seq_len = tl.load(seq_lens_ptr + program)
    verified = tl.where(num_logits > 1, num_logits, 0)
    tl.store(out_state_rows_ptr + program, state_row.to(tl.int32))
    tl.store(out_first_rows_ptr + program, first)
    tl.store(out_num_rows_ptr + program, verified)
    tl.store(out_prefix_lens_ptr + program, seq_len - verified)
    nodes = tl.arange(0, BLOCK_N)
    is_node = nodes < num_logits - 1
    depths = tl.load(depths_ptr + state_row * N + nodes, mask=is_node, other=0)
    tl.store(out_positions_ptr + first + 1 + nodes, (seq_len - num_logits + depths).to(tl.int64), mask=is_node)


@dataclass(frozen=True)
class AcceptedRows:
    """A step as the drafter reads it: of verified rows, the accepted ones, in the order of the text.

    Of each of the first requests there are 1 + D rows, the last `num_rejected` of them padding; all rows of the others
    follow.
    """

    rows: torch.Tensor  # [C] int32 which of the step's rows
    positions: torch.Tensor  # [C] int64 of their slots, once moved
    query_start_loc: torch.Tensor  # [R+1] int32
    seq_lens: torch.Tensor  # [R] int32 up to the last of these rows
    num_rejected: torch.Tensor  # [R] int32

    @classmethod
    def allocate(cls, max_num_reqs: int, max_num_rows: int, device: torch.device) -> AcceptedRows:
        """For up to so many requests and rows."""
        return cls(
            rows=torch.zeros(max_num_rows, dtype=torch.int32, device=device),
            positions=torch.zeros(max_num_rows, dtype=torch.int64, device=device),
            query_start_loc=torch.zeros(max_num_reqs + 1, dtype=torch.int32, device=device),
            seq_lens=torch.zeros(max_num_reqs, dtype=torch.int32, device=device),
            num_rejected=torch.zeros(max_num_reqs, dtype=torch.int32, device=device),
        )


def write_accepted_rows(
    out: AcceptedRows,
    way: torch.Tensor,  # [S, D] int32; accepted rows of a verification, the root's being 0
    state_rows: torch.Tensor,  # [R]
    positions: torch.Tensor,  # [T] int64, of the slots
    query_start_loc: torch.Tensor,  # [>= R+1] int32
    cu_num_logits: torch.Tensor,  # [R+1] int32
    seq_lens: torch.Tensor,  # [>= R] int32
    num_sampled: torch.Tensor,  # [R] int32
    num_rejected: torch.Tensor,  # [R] int32
    num_reqs: int,  # R
    num_verifying: int,  # requests that lead the batch and have one row besides their candidates
    longest: int,  # rows of a request, at most
) -> None:
    """Fill the buffers."""
    num_depths = way.shape[1]
    blocks = triton.cdiv(longest, _ROWS) if num_verifying < num_reqs else 1
    _accepted_rows_kernel[(num_reqs, blocks)](
        out.rows,
        out.positions,
        out.query_start_loc,
        out.seq_lens,
        out.num_rejected,
        way,
        state_rows,
        positions,
        query_start_loc,
        cu_num_logits,
        seq_lens,
        num_sampled,
        num_rejected,
        num_verifying,
        D=num_depths,
        BLOCK_D=triton.next_power_of_2(1 + num_depths),
        ROWS=_ROWS,
        num_warps=1,
    )


@RepeatedLaunch
@triton.jit(do_not_specialize=["num_verifying"])
def _accepted_rows_kernel(
    out_rows_ptr,  # [C]
    out_positions_ptr,  # [C]
    out_query_start_loc_ptr,  # [R+1]
    out_seq_lens_ptr,  # [R]
    out_num_rejected_ptr,  # [R]
    way_ptr,  # [S, D]
    state_rows_ptr,  # [R]
    positions_ptr,  # [T]
    query_start_loc_ptr,  # [R+1]
    cu_num_logits_ptr,  # [R+1]
    seq_lens_ptr,  # [R]
    num_sampled_ptr,  # [R]
    num_rejected_ptr,  # [R]
    num_verifying,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    request, block = tl.program_id(0), tl.program_id(1)
    start = tl.load(query_start_loc_ptr + request)
    end = tl.load(query_start_loc_ptr + request + 1)
    seq_len = tl.load(seq_lens_ptr + request)
    if block == 0 and request == 0:
        tl.store(out_query_start_loc_ptr, 0)
    if request < num_verifying:
        if block > 0:
            return
        num_logits = tl.load(cu_num_logits_ptr + request + 1) - tl.load(cu_num_logits_ptr + request)
        root = end - num_logits
        prefix = seq_len - num_logits
        kept = tl.maximum(tl.load(num_sampled_ptr + request), 1)
        way_ptr += tl.load(state_rows_ptr + request).to(tl.int64) * D
        places = tl.arange(0, BLOCK_D)
        is_accepted = (places > 0) & (places < kept) & (places < num_logits)
        way = tl.load(way_ptr + places - 1, mask=is_accepted, other=0)
        base = request * (1 + D)
        tl.store(out_rows_ptr + base + places, root + way, mask=places <= D)
        tl.store(out_positions_ptr + base + places, (prefix + places).to(tl.int64), mask=places <= D)
        tl.store(out_query_start_loc_ptr + request + 1, base + 1 + D)
        tl.store(out_seq_lens_ptr + request, prefix + 1 + D)
        tl.store(out_num_rejected_ptr + request, 1 + D - kept)
        return
    shift = num_verifying * (1 + D) - tl.load(query_start_loc_ptr + num_verifying)
    rows = start + block * ROWS + tl.arange(0, ROWS)
    is_row = rows < end
    tl.store(out_rows_ptr + shift + rows, rows, mask=is_row)
    tl.store(out_positions_ptr + shift + rows, tl.load(positions_ptr + rows, mask=is_row), mask=is_row)
    if block == 0:
        tl.store(out_query_start_loc_ptr + request + 1, shift + end)
        tl.store(out_seq_lens_ptr + request, seq_len)
        tl.store(out_num_rejected_ptr + request, tl.load(num_rejected_ptr + request))
