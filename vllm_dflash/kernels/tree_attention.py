# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention of a tree's rows to each other, merged with what they saw of the prefix.

The prefix is the same for all rows of a request, so any attention kernel that returns its log-sum-exp serves for it.
What is left is small: 1 + N rows by 1 + N, from this step's own q, k and v, under one bit for each pair. Softmax over
both parts follows from each part's log-sum-exp.

Letters: T rows of the step, R requests, S rows of the runner's state, N nodes, W words of 32 bits, D head size. The
query heads that share a K/V head are more rows of one product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.triton_utils import tl, triton

from vllm_dflash.kernels.repeated_launch import RepeatedLaunch
from vllm_dflash.tree import WORD_BITS


@dataclass(frozen=True)
class Tile:
    """What one program does."""

    block_rows: int  # of query rows times heads of a group
    block_keys: int = 32
    num_warps: int = 4


#: Programs that run at once on a GPU of the size that the tiles were measured on, and a few more.
_FEW_PROGRAMS = 160


def choose_tile(num_requests: int, num_kv_heads: int, num_rows: int, num_keys: int, is_gpu: bool = True) -> Tile:
    """The tile for requests of so many rows, heads of a group counted, by so many keys. Measured on an H200.

    While there are few programs, more and smaller ones are done sooner. Not in Triton's interpreter, which runs them
    one by one.
    """
    if not is_gpu:
        return Tile(64)
    if num_requests * num_kv_heads * triton.cdiv(num_rows, 64) < _FEW_PROGRAMS:
        return Tile(16, 32 if num_keys <= 32 else 64)
    return Tile(64) if num_rows > 32 else Tile(32, num_warps=2)


def merge_tree_attention(
    out: torch.Tensor,  # [T, heads, D] attention over the prefix; becomes that over prefix and tree
    prefix_lse: torch.Tensor,  # [heads, T] fp32; infinite: no prefix
    query: torch.Tensor,  # [T, heads, D]
    key: torch.Tensor,  # [T, K/V heads, D]
    value: torch.Tensor,  # [T, K/V heads, D]
    ancestor_words: torch.Tensor,  # [S, 1+N, W] int32; bit j of row i: row i sees row j
    state_rows: torch.Tensor,  # [R] int32 whose tree each request verifies
    first_rows: torch.Tensor,  # [R] int32 each tree's root among the T rows
    num_rows: torch.Tensor,  # [R] int32 rows of each tree, its first ones; 0: none
    scale: float,
    max_rows: int | None = None,  # of any request; None: 1 + N
    tile: Tile | None = None,
    sinks: torch.Tensor | None = None,  # [heads]; a score of each head without a value, which a prefix's lse has in it
) -> None:
    """Add the trees to the attention of their rows. Other rows are not touched."""
    num_requests, (_, row_stride, num_words) = len(state_rows), ancestor_words.shape
    max_rows = row_stride if max_rows is None else min(max_rows, row_stride)
    num_heads, num_kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[2]
    group = num_heads // num_kv_heads
    assert max_rows <= num_words * WORD_BITS and ancestor_words.is_contiguous(), f"{tuple(ancestor_words.shape)}"
    assert all(states.stride(2) == 1 for states in (out, query, key, value))
    assert prefix_lse.shape == (num_heads, query.shape[0]), f"{tuple(prefix_lse.shape)}"
    if not num_requests:
        return
    tile = tile or choose_tile(num_requests, num_kv_heads, max_rows * group, max_rows, query.is_cuda)
    _merge_tree_attention_kernel[(num_requests, num_kv_heads, triton.cdiv(max_rows * group, tile.block_rows))](
        out,
        prefix_lse,
        query,
        key,
        value,
        ancestor_words,
        state_rows,
        first_rows,
        num_rows,
        query if sinks is None else sinks,
        scale,
        out.stride(0),
        out.stride(1),
        prefix_lse.stride(0),
        prefix_lse.stride(1),
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        HAS_SINKS=sinks is not None,
        GROUP=group,
        WORD_ROWS=row_stride,
        WORDS=num_words,
        WORD_BITS=WORD_BITS,
        D=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_ROWS=tile.block_rows,
        BLOCK_KEYS=tile.block_keys,
        num_warps=tile.num_warps,
        num_stages=1,  # most trees are one step of keys, and registers decide
    )


@triton.jit
def tree_tile(
    key_ptr,  # of a tree's root and one head
    value_ptr,  # the same
    words_ptr,  # [rows, WORDS] of the tree
    rows,  # [X] that look
    others,  # [Y] that are looked at
    columns,  # [D]
    is_row,  # [X]
    is_other,  # [Y]
    is_column,  # [D]
    key_row_stride,
    value_row_stride,
    WORDS: tl.constexpr,
    WORD_BITS: tl.constexpr,
):
    """Some rows of a tree as keys [Y, D] and values [Y, D], and which rows see them [X, Y] bool."""
    mask = is_other[:, None] & is_column[None, :]
    keys = tl.load(key_ptr + others[:, None] * key_row_stride + columns[None, :], mask=mask, other=0.0)
    values = tl.load(value_ptr + others[:, None] * value_row_stride + columns[None, :], mask=mask, other=0.0)
    words = tl.load(
        words_ptr + rows[:, None] * WORDS + (others // WORD_BITS)[None, :],
        mask=is_row[:, None] & is_other[None, :],
        other=0,
    )
    return keys, values, ((words >> (others % WORD_BITS)[None, :]) & 1) != 0


@triton.jit
def attend(
    query,  # [X, D]
    keys,  # [Y, D]
    values,  # [Y, D]
    sees,  # [X, Y] bool
    scale,
    top,  # [X]
    total,  # [X]
    sums,  # [X, D]
):
    """A softmax so far, with these keys: the largest score, the sum of exponentials, and of values weighted by them."""
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    scores = tl.where(sees, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet
    weights = tl.exp(scores - finite_top[:, None])
    shrink = tl.exp(top - finite_top)
    total = total * shrink + tl.sum(weights, axis=1)
    sums = sums * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return new_top, total, sums


@RepeatedLaunch
@triton.jit
def _merge_tree_attention_kernel(
    out_ptr,  # [T, heads, D]
    lse_ptr,  # [heads, T]
    query_ptr,  # [T, heads, D]
    key_ptr,  # [T, K/V heads, D]
    value_ptr,  # [T, K/V heads, D]
    words_ptr,  # [S, WORD_ROWS, WORDS]
    state_rows_ptr,  # [R]
    first_rows_ptr,  # [R]
    num_rows_ptr,  # [R]
    sinks_ptr,  # [heads]; read only if HAS_SINKS
    scale,
    out_row_stride,
    out_head_stride,
    lse_head_stride,
    lse_row_stride,
    query_row_stride,
    query_head_stride,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    HAS_SINKS: tl.constexpr,
    GROUP: tl.constexpr,
    WORD_ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    WORD_BITS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    request = tl.program_id(0)
    kv_head = tl.program_id(1)
    first = tl.load(first_rows_ptr + request).to(tl.int64)
    num_rows = tl.load(num_rows_ptr + request)
    if tl.program_id(2) * BLOCK_ROWS >= num_rows * GROUP:
        return
    words_ptr += tl.load(state_rows_ptr + request).to(tl.int64) * WORD_ROWS * WORDS
    flat = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows = flat // GROUP
    heads = kv_head * GROUP + flat % GROUP
    is_row = rows < num_rows
    columns = tl.arange(0, BLOCK_D)
    is_column = columns < D
    in_query = is_row[:, None] & is_column[None, :]

    query = tl.load(
        query_ptr + (first + rows)[:, None] * query_row_stride + heads[:, None] * query_head_stride + columns[None, :],
        mask=in_query,
        other=0.0,
    )
    # Asked for before they are needed, so that they come while the tree is looked at.
    pointers = out_ptr + (first + rows)[:, None] * out_row_stride + heads[:, None] * out_head_stride + columns[None, :]
    prefix = tl.load(pointers, mask=in_query, other=0.0)
    lse = tl.load(lse_ptr + heads * lse_head_stride + (first + rows) * lse_row_stride, mask=is_row, other=0.0)
    has_prefix = tl.abs(lse) != float("inf")
    without = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    if HAS_SINKS:
        without = tl.load(sinks_ptr + heads, mask=is_row, other=0.0).to(tl.float32)
    lse = tl.where(has_prefix, lse, without)
    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for start in range(0, num_rows, BLOCK_KEYS):
        others = start + tl.arange(0, BLOCK_KEYS)
        keys, values, sees = tree_tile(
            key_ptr + first * key_row_stride + kv_head * key_head_stride,
            value_ptr + first * value_row_stride + kv_head * value_head_stride,
            words_ptr,
            rows,
            others,
            columns,
            is_row,
            others < num_rows,
            is_column,
            key_row_stride,
            value_row_stride,
            WORDS,
            WORD_BITS,
        )
        top, total, sums = attend(query, keys, values, sees, scale, top, total, sums)

    highest = tl.maximum(lse, top)
    highest = tl.where(is_row, highest, 0.0)
    of_prefix = tl.exp(lse - highest)
    of_tree = tl.exp(top - highest)
    prefix = tl.where(has_prefix[:, None], prefix.to(tl.float32), 0.0)  # without a prefix it may be anything
    merged = prefix * of_prefix[:, None] + sums * of_tree[:, None]
    merged = merged / tl.where(is_row, of_prefix + total * of_tree, 1.0)[:, None]
    tl.store(pointers, merged.to(out_ptr.dtype.element_ty), mask=in_query)


def reference_merge_tree_attention(
    out: torch.Tensor,  # [T, heads, D]
    prefix_lse: torch.Tensor,  # [heads, T]
    query: torch.Tensor,  # [T, heads, D]
    key: torch.Tensor,  # [T, K/V heads, D]
    value: torch.Tensor,  # [T, K/V heads, D]
    ancestors: torch.Tensor,  # [R, 1+N, 1+N] bool
    first_rows: torch.Tensor,  # [R]
    num_rows: torch.Tensor,  # [R]
    scale: float,
) -> None:
    """The same in plain torch, request by request, of a mask that is not packed and without sinks."""
    group = query.shape[1] // key.shape[1]
    for request, (first, count) in enumerate(zip(first_rows.tolist(), num_rows.tolist(), strict=True)):
        if not count:
            continue
        rows = slice(first, first + count)
        keys, values = (states[rows].float().repeat_interleave(group, dim=1) for states in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[rows].float(), keys) * scale
        scores = scores.masked_fill(~ancestors[request, :count, :count], float("-inf"))
        tree_lse = scores.logsumexp(dim=-1)  # [heads, rows]
        of_tree = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), values)
        lse = prefix_lse[:, rows]
        lse = torch.where(lse.isinf(), float("-inf"), lse)
        share = (lse - torch.logaddexp(lse, tree_lse)).exp().t()[:, :, None]  # [rows, heads, 1]
        prefix = torch.where(share > 0, out[rows].float(), 0.0)
        out[rows] = (prefix * share + of_tree * (1 - share)).to(out.dtype)
