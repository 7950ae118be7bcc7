# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention of a tree's rows in a layer with a sliding window, over what the window leaves of the prefix, and the tree.

Rows of one depth are at one position of different texts, so each row has a window of its own, which no kernel for
consecutive rows knows. But a window is short, so that one program looks at all of it, in the paged cache, and at the
tree as `tree_attention.py` does.

Letters: T rows of the step, R requests, S rows of the runner's state, N nodes, W words of 32 bits, D head size.
"""

from __future__ import annotations

import torch
from vllm.triton_utils import tl, triton

from vllm_dflash.kernels.tree_attention import attend, tree_tile
from vllm_dflash.kernels.tree_rows import VerifiedRows
from vllm_dflash.tree import WORD_BITS

_BLOCK_ROWS, _BLOCK_KEYS = 64, 32


def window_tree_attention(
    out: torch.Tensor,  # [T, heads, D], written at the verified rows
    query: torch.Tensor,  # [T, heads, D]
    key: torch.Tensor,  # [T, K/V heads, D]
    value: torch.Tensor,  # [T, K/V heads, D]
    kv_cache: torch.Tensor,  # [blocks, K/V heads, block size, 2*D] by strides
    block_table: torch.Tensor,  # [>= R, blocks] int32
    ancestor_words: torch.Tensor,  # [S, 1+N, W] int32; bit j of row i: row i sees row j
    verified: VerifiedRows,
    num_reqs: int,  # R; those without candidates have one row, the prefix's last, or without that too, are padding
    scale: float,
    window: int,  # positions that a row sees, its own included
    sinks: torch.Tensor | None = None,  # [heads]; a score of each head that takes part without a value
    max_rows: int | None = None,  # of any request; None: 1 + N
) -> None:
    """All of the verified rows' attention. Other rows are not touched."""
    _, row_stride, num_words = ancestor_words.shape
    max_rows = row_stride if max_rows is None else min(max_rows, row_stride)
    (_, num_heads, head_dim), num_kv_heads = query.shape, key.shape[1]
    group, block_size = num_heads // num_kv_heads, kv_cache.shape[2]
    assert all(states.stride(2) == 1 for states in (out, query, key, value)) and kv_cache.stride(3) == 1
    assert block_table.stride(1) == 1 and ancestor_words.is_contiguous() and window > 0
    if not num_reqs:
        return
    _window_tree_attention_kernel[(num_reqs, num_kv_heads, triton.cdiv(max_rows * group, _BLOCK_ROWS))](
        out,
        query,
        key,
        value,
        kv_cache,
        block_table,
        ancestor_words,
        verified.state_rows,
        verified.first_rows,
        verified.num_rows,
        verified.prefix_lens,
        verified.positions,
        sinks,
        scale,
        window,
        out.stride(0),
        out.stride(1),
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        block_table.stride(0),
        HAS_SINKS=sinks is not None,
        GROUP=group,
        WORD_ROWS=row_stride,
        WORDS=num_words,
        WORD_BITS=WORD_BITS,
        BLOCK_SIZE=block_size,
        D=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_KEYS=_BLOCK_KEYS,
    )


@triton.jit
def _window_tree_attention_kernel(
    out_ptr,  # [T, heads, D]
    query_ptr,  # [T, heads, D]
    key_ptr,  # [T, K/V heads, D]
    value_ptr,  # [T, K/V heads, D]
    cache_ptr,  # [blocks, K/V heads, BLOCK_SIZE, 2*D]
    block_table_ptr,  # [R, blocks]
    words_ptr,  # [S, WORD_ROWS, WORDS]
    state_rows_ptr,  # [R]
    first_rows_ptr,  # [R]
    num_rows_ptr,  # [R]
    prefix_lens_ptr,  # [R]
    positions_ptr,  # [T]
    sinks_ptr,  # [heads]; read only if HAS_SINKS
    scale,
    window,
    out_row_stride,
    out_head_stride,
    query_row_stride,
    query_head_stride,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    cache_block_stride,
    cache_head_stride,
    cache_slot_stride,
    block_table_stride,
    HAS_SINKS: tl.constexpr,
    GROUP: tl.constexpr,
    WORD_ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    WORD_BITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    request, kv_head = tl.program_id(0), tl.program_id(1)
    prefix_len = tl.load(prefix_lens_ptr + request)
    in_tree = tl.load(num_rows_ptr + request)
    num_rows = tl.where(prefix_len > 0, tl.maximum(in_tree, 1), in_tree)
    if tl.program_id(2) * BLOCK_ROWS >= num_rows * GROUP:
        return
    first = tl.load(first_rows_ptr + request).to(tl.int64)
    flat = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows, heads = flat // GROUP, kv_head * GROUP + flat % GROUP
    is_row = rows < num_rows
    columns = tl.arange(0, BLOCK_D)
    is_column = columns < D
    in_rows = is_row[:, None] & is_column[None, :]
    positions = tl.load(positions_ptr + first + rows, mask=is_row, other=0)
    query = tl.load(
        query_ptr + (first + rows)[:, None] * query_row_stride + heads[:, None] * query_head_stride + columns[None, :],
        mask=in_rows,
        other=0.0,
    )
    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    if HAS_SINKS:
        top = tl.load(sinks_ptr + heads, mask=is_row, other=0.0).to(tl.float32)
        total = tl.full([BLOCK_ROWS], 1.0, tl.float32)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)

    # The earliest row is the root: at the prefix's length, or without candidates one before.
    begin = tl.maximum(prefix_len - window, 0) // BLOCK_KEYS * BLOCK_KEYS
    for start in range(begin, prefix_len, BLOCK_KEYS):
        slots = start + tl.arange(0, BLOCK_KEYS)
        is_slot = slots < prefix_len
        blocks = tl.load(block_table_ptr + request * block_table_stride + slots // BLOCK_SIZE, mask=is_slot, other=0)
        offsets = blocks.to(tl.int64) * cache_block_stride + kv_head * cache_head_stride
        offsets += slots % BLOCK_SIZE * cache_slot_stride
        in_slots = is_slot[:, None] & is_column[None, :]
        keys = tl.load(cache_ptr + offsets[:, None] + columns[None, :], mask=in_slots, other=0.0)
        values = tl.load(cache_ptr + offsets[:, None] + D + columns[None, :], mask=in_slots, other=0.0)
        sees = is_row[:, None] & is_slot[None, :] & (positions[:, None] - slots[None, :] < window)
        top, total, sums = attend(query, keys, values, sees, scale, top, total, sums)

    words_ptr += tl.load(state_rows_ptr + request).to(tl.int64) * WORD_ROWS * WORDS
    for start in range(0, in_tree, BLOCK_KEYS):
        others = start + tl.arange(0, BLOCK_KEYS)
        is_other = others < in_tree
        keys, values, sees = tree_tile(
            key_ptr + first * key_row_stride + kv_head * key_head_stride,
            value_ptr + first * value_row_stride + kv_head * value_head_stride,
            words_ptr,
            rows,
            others,
            columns,
            is_row,
            is_other,
            is_column,
            key_row_stride,
            value_row_stride,
            WORDS,
            WORD_BITS,
        )
        away = positions[:, None] - tl.load(positions_ptr + first + others, mask=is_other, other=0)[None, :]
        sees = sees & (away < window)
        top, total, sums = attend(query, keys, values, sees, scale, top, total, sums)

    pointers = out_ptr + (first + rows)[:, None] * out_row_stride + heads[:, None] * out_head_stride + columns[None, :]
    attended = sums / tl.where(is_row, total, 1.0)[:, None]
    tl.store(pointers, attended.to(out_ptr.dtype.element_ty), mask=in_rows)
