# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Row arithmetic of a step in one launch: context rows and query rows of all cache groups, padding included.

Written into buffers that are allocated once, since a CUDA graph reads them at fixed addresses. It replays for its
captured sizes, so rows past the batch must be harmless: they get padding slots, and sequences of length 0.

Letters: R requests, P >= R requests after padding, T target rows, C context rows of the buffers, Q query rows a
request, G KV-cache groups, S rows of the runner's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.triton_utils import tl, triton

from vllm_dflash.kernels.repeated_launch import RepeatedLaunch

#: Rows that one program handles at a time. Fixed, so that one compiled kernel serves prefill and decode.
_ROWS = 256


@dataclass(frozen=True)
class BlockInputBuffers:
    """What the draft model reads, at fixed addresses. Only the part of a step's padded sizes is ever written."""

    context_positions: torch.Tensor  # [C] int64
    context_slots: torch.Tensor  # [G, C] int64; -1 writes nothing
    input_ids: torch.Tensor  # [max_num_reqs*Q] int32
    positions: torch.Tensor  # [max_num_reqs*Q] int64
    query_slots: torch.Tensor  # [G, max_num_reqs*Q] int64; -1 writes nothing
    query_start_loc: torch.Tensor  # [max_num_reqs+1] int32
    seq_lens: torch.Tensor  # [max_num_reqs] int32

    @classmethod
    def allocate(
        cls,
        max_num_reqs: int,
        num_query_rows: int,
        max_context_rows: int,
        num_groups: int,
        device: torch.device | str,
    ) -> BlockInputBuffers:
        """Buffers for up to `max_num_reqs` requests of up to `num_query_rows` rows, all of them padding."""
        num_rows = max_num_reqs * num_query_rows
        return cls(
            context_positions=torch.zeros(max_context_rows, dtype=torch.int64, device=device),
            context_slots=torch.full((num_groups, max_context_rows), -1, dtype=torch.int64, device=device),
            input_ids=torch.zeros(num_rows, dtype=torch.int32, device=device),
            positions=torch.zeros(num_rows, dtype=torch.int64, device=device),
            query_slots=torch.full((num_groups, num_rows), -1, dtype=torch.int64, device=device),
            query_start_loc=torch.zeros(max_num_reqs + 1, dtype=torch.int32, device=device),
            seq_lens=torch.zeros(max_num_reqs, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class BlockTablePointers:
    """Where the block tables of all groups are, for a kernel that serves them all. Built once, not once a step."""

    fields: torch.Tensor  # [G, 4] int64 on the device: address, row stride, width, block size
    tensors: tuple[torch.Tensor, ...]  # G tables [max_num_reqs, width] int32; held, since only their addresses are read
    block_sizes: tuple[int, ...]  # G

    @classmethod
    def of(
        cls,
        tensors: Sequence[torch.Tensor],  # G tables [max_num_reqs, width] int32
        block_sizes: Sequence[int],  # G
    ) -> BlockTablePointers:
        fields = []
        for table, block_size in zip(tensors, block_sizes, strict=True):
            assert table.dtype == torch.int32 and table.stride(1) == 1, f"{table.dtype}, strides {table.stride()}"
            assert block_size > 0, f"{block_size=}"
            fields.append([table.data_ptr(), table.stride(0), table.shape[1], block_size])
        device = tensors[0].device
        return cls(torch.tensor(fields, dtype=torch.int64, device=device), tuple(tensors), tuple(block_sizes))


def write_block_inputs(
    buffers: BlockInputBuffers,
    *,
    positions: torch.Tensor,  # [>=T] int64
    query_start_loc: torch.Tensor,  # [>=R+1] int32; first target row of each request
    seq_lens: torch.Tensor,  # [>=R] int32; context rows after this step, rejected rows included
    num_rejected: torch.Tensor | None,  # [>=R] int32; None: no row was rejected
    num_sampled: torch.Tensor,  # [>=R] int32; 0: the request is in mid-prefill
    state_index: torch.Tensor,  # [>=R] row of each request in the runner's state
    last_sampled: torch.Tensor,  # [S] or [S, 1]
    next_prompt_token: torch.Tensor,  # [S]
    block_tables: BlockTablePointers,  # row r of each table is request r's
    num_reqs: int,  # R
    num_rows: int,  # T
    max_query_len: int,  # of any request's target rows; decides how many programs share a request's rows
    num_reqs_padded: int,  # P
    num_context_rows_padded: int,  # >= T
    num_query_rows: int,  # Q; may be less than the buffers were made for
    mask_token_id: int,
    max_model_len: int,
) -> None:
    """The context rows' positions and slots, and the query rows [anchor, mask x (Q-1)] behind them. No host sync.

    Example: a request ran rows at positions 7, 8, 9 and its last draft was rejected: context rows 7 and 8 get their
    slots and row 9 gets -1, and the query rows start at position 9.
    """
    num_groups = buffers.context_slots.shape[0]
    assert block_tables.fields.shape[0] == num_groups, f"{block_tables.fields.shape[0]} tables, {num_groups} groups"
    assert num_reqs <= num_reqs_padded <= buffers.seq_lens.shape[0], f"{num_reqs=}, {num_reqs_padded=}"
    assert num_rows <= num_context_rows_padded <= buffers.context_positions.shape[0], f"{num_context_rows_padded=}"
    assert num_reqs_padded * num_query_rows <= buffers.input_ids.shape[0], f"{num_query_rows=}"
    _check_inputs(positions, query_start_loc, seq_lens, num_rejected, num_sampled, state_index)
    assert last_sampled.is_contiguous() and next_prompt_token.is_contiguous()

    longest = max(max_query_len, num_context_rows_padded - num_rows, 1)
    # One more than there are requests: the last one pads the context rows and ends query_start_loc.
    grid = (num_reqs_padded + 1, triton.cdiv(longest, _ROWS), num_groups)
    _block_inputs_kernel[grid](
        buffers.context_positions,
        buffers.context_slots,
        buffers.input_ids,
        buffers.positions,
        buffers.query_slots,
        buffers.query_start_loc,
        buffers.seq_lens,
        buffers.context_slots.stride(0),
        buffers.query_slots.stride(0),
        positions,
        query_start_loc,
        seq_lens,
        num_rejected if num_rejected is not None else num_sampled,
        num_sampled,
        state_index,
        last_sampled,
        next_prompt_token,
        block_tables.fields,
        num_reqs,
        num_rows,
        num_reqs_padded,
        num_context_rows_padded,
        num_query_rows,
        mask_token_id,
        max_model_len,
        HAS_REJECTED=num_rejected is not None,
        ROWS=_ROWS,
    )


def _check_inputs(
    positions: torch.Tensor,  # [>=T]
    *per_request: torch.Tensor | None,  # [>=R] each
) -> None:
    assert positions.dtype == torch.int64 and positions.is_contiguous()
    for values in per_request:
        assert values is None or (values.ndim == 1 and values.is_contiguous()), "one value a request, contiguous"


@triton.jit
def _slots(
    tables_ptr,  # [G, 4] address, row stride, width, block size
    group,
    request,
    positions,  # [ROWS] int64
    keep,  # [ROWS]
):
    """Cache slots of one request's rows; -1 for rows not kept, past the table's width or in the null block."""
    fields = tables_ptr + group * 4
    table_ptr = tl.load(fields).to(tl.pointer_type(tl.int32))
    stride, width, block_size = tl.load(fields + 1), tl.load(fields + 2), tl.load(fields + 3)
    columns = positions // block_size
    keep = keep & (columns < width)
    blocks = tl.load(table_ptr + request * stride + columns, mask=keep, other=0).to(tl.int64)
    # Physical block 0 is the null block: what is written there is seen by every request.
    return tl.where(blocks != 0, blocks * block_size + positions % block_size, -1)


# Batch sizes differ from step to step: specialising on their divisibility would compile the kernel again and again.
@RepeatedLaunch
@triton.jit(
    do_not_specialize=[
        "num_reqs",
        "num_rows",
        "num_reqs_padded",
        "num_context_rows_padded",
        "num_query_rows",
        "mask_token_id",
        "max_model_len",
    ]
)
def _block_inputs_kernel(
    out_context_positions_ptr,  # [C]
    out_context_slots_ptr,  # [G, C]
    out_input_ids_ptr,  # [max_num_reqs*Q]
    out_positions_ptr,  # [max_num_reqs*Q]
    out_query_slots_ptr,  # [G, max_num_reqs*Q]
    out_query_start_loc_ptr,  # [max_num_reqs+1]
    out_seq_lens_ptr,  # [max_num_reqs]
    context_slots_stride,
    query_slots_stride,
    positions_ptr,  # [T]
    query_start_loc_ptr,  # [R+1]
    seq_lens_ptr,  # [R]
    num_rejected_ptr,  # [R]; read only if HAS_REJECTED
    num_sampled_ptr,  # [R]
    state_index_ptr,  # [R]
    last_sampled_ptr,  # [S]
    next_prompt_token_ptr,  # [S]
    tables_ptr,  # [G, 4]
    num_reqs,
    num_rows,
    num_reqs_padded,
    num_context_rows_padded,
    num_query_rows,
    mask_token_id,
    max_model_len,
    HAS_REJECTED: tl.constexpr,
    ROWS: tl.constexpr,
):
    # Requests 0 .. R-1 are real, R .. P-1 have no rows of their own, and "request" P owns the context rows past the
    # last real request's, all of them padding.
    request = tl.program_id(0)
    chunk, num_chunks = tl.program_id(1), tl.num_programs(1)
    group = tl.program_id(2)
    is_real = request < num_reqs
    rejected = 0
    if HAS_REJECTED:
        rejected = tl.load(num_rejected_ptr + request, mask=is_real, other=0)
    out_context_slots_ptr += group * context_slots_stride
    out_query_slots_ptr += group * query_slots_stride

    start = tl.load(query_start_loc_ptr + tl.minimum(request, num_reqs))
    end = tl.load(query_start_loc_ptr + request + 1, mask=is_real, other=0)
    valid_end = tl.where(is_real, end - rejected, start)
    end = tl.where(is_real, end, tl.where(request == num_reqs_padded, num_context_rows_padded, start))
    for first in range(start + chunk * ROWS, end, num_chunks * ROWS):
        rows = first + tl.arange(0, ROWS)
        positions = tl.load(positions_ptr + rows, mask=rows < tl.minimum(end, num_rows), other=0)
        slots = _slots(tables_ptr, group, request, positions, rows < valid_end)
        tl.store(out_context_slots_ptr + rows, slots, mask=rows < end)
        if group == 0:
            tl.store(out_context_positions_ptr + rows, positions, mask=rows < end)

    if chunk == 0:
        if group == 0:
            tl.store(out_query_start_loc_ptr + request, tl.minimum(request, num_reqs) * num_query_rows)
        if request < num_reqs_padded:
            context_len = tl.load(seq_lens_ptr + request, mask=is_real, other=0).to(tl.int64) - rejected
            state = tl.load(state_index_ptr + request, mask=is_real, other=0).to(tl.int64)
            sampled = tl.load(num_sampled_ptr + request, mask=is_real, other=0) > 0
            last = tl.load(last_sampled_ptr + state, mask=is_real & sampled, other=0).to(tl.int32)
            prompt = tl.load(next_prompt_token_ptr + state, mask=is_real & (sampled == 0), other=0).to(tl.int32)
            anchor = tl.where(is_real, tl.where(sampled, last, prompt), mask_token_id)
            limit = tl.where(is_real, max_model_len, 0)  # nothing fits in a padding request
            if group == 0:
                tl.store(out_seq_lens_ptr + request, tl.minimum(context_len + num_query_rows, limit).to(tl.int32))
            for first in range(0, num_query_rows, ROWS):
                offsets = first + tl.arange(0, ROWS)
                mask = offsets < num_query_rows
                rows = request * num_query_rows + offsets
                # Positions at and past the limit could never be accepted; they are kept in range of every table.
                fits = context_len + offsets < limit
                positions = tl.minimum(context_len + offsets, tl.maximum(limit - 1, 0))
                slots = _slots(tables_ptr, group, request, positions, mask & fits)
                tl.store(out_query_slots_ptr + rows, slots, mask=mask)
                if group == 0:
                    tl.store(out_positions_ptr + rows, positions, mask=mask)
                    tl.store(out_input_ids_ptr + rows, tl.where(offsets == 0, anchor, mask_token_id), mask=mask)


def reference_block_inputs(
    buffers: BlockInputBuffers,
    *,
    positions: torch.Tensor,  # [>=T] int64
    query_start_loc: torch.Tensor,  # [>=R+1] int32
    seq_lens: torch.Tensor,  # [>=R] int32
    num_rejected: torch.Tensor | None,  # [>=R] int32
    num_sampled: torch.Tensor,  # [>=R] int32
    state_index: torch.Tensor,  # [>=R]
    last_sampled: torch.Tensor,  # [S] or [S, 1]
    next_prompt_token: torch.Tensor,  # [S]
    block_tables: BlockTablePointers,
    num_reqs: int,
    num_rows: int,
    max_query_len: int,
    num_reqs_padded: int,
    num_context_rows_padded: int,
    num_query_rows: int,
    mask_token_id: int,
    max_model_len: int,
) -> None:
    """The same as `write_block_inputs`, row by row in Python."""

    def slot(group: int, request: int, position: int) -> int:
        table, size = block_tables.tensors[group], block_tables.block_sizes[group]
        column = position // size
        block = int(table[request, column]) if column < table.shape[1] else 0
        return block * size + position % size if block else -1

    groups = range(len(block_tables.tensors))
    buffers.context_positions[:num_rows] = positions[:num_rows]
    buffers.context_positions[num_rows:num_context_rows_padded] = 0
    buffers.context_slots[:, :num_context_rows_padded] = -1
    num_query = num_reqs_padded * num_query_rows
    buffers.input_ids[:num_query] = mask_token_id
    buffers.positions[:num_query] = 0
    buffers.query_slots[:, :num_query] = -1
    buffers.seq_lens[:num_reqs_padded] = 0
    buffers.query_start_loc[: num_reqs_padded + 1] = num_reqs * num_query_rows
    for request in range(num_reqs):
        rejected = 0 if num_rejected is None else int(num_rejected[request])
        for row in range(int(query_start_loc[request]), int(query_start_loc[request + 1]) - rejected):
            for group in groups:
                buffers.context_slots[group, row] = slot(group, request, int(positions[row]))
        first, context_len = request * num_query_rows, int(seq_lens[request]) - rejected
        buffers.query_start_loc[request] = first
        buffers.seq_lens[request] = min(context_len + num_query_rows, max_model_len)
        tokens = last_sampled if num_sampled[request] > 0 else next_prompt_token
        buffers.input_ids[first] = tokens.flatten()[state_index[request]]
        for offset in range(num_query_rows):
            position = context_len + offset
            buffers.positions[first + offset] = min(position, max_model_len - 1)
            for group in groups:
                fits = position < max_model_len
                buffers.query_slots[group, first + offset] = slot(group, request, position) if fits else -1
