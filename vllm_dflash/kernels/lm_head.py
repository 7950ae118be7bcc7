# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The LM head of a greedy draft: the likeliest token of every row, without the logits ever being written.

Each program reduces its tile of logits to one maximum and its index a row; a second, tiny kernel reduces the tiles.
Of the final norm the first half is enough (`rms_norm.py`): dividing a row by its root mean square moves no maximum. Of
equal logits the lowest index wins, in both kernels.

Letters: V rows of the LM head, K its columns, R requests, Q query rows a request.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from vllm.triton_utils import tl, triton

from vllm_dflash.kernels.skinny_linear import (
    Tile,
    block_rows,
    check_operands,
    choose_tile,
    stream_product,
    weight_rows,
)

#: Tiles that the second kernel reduces at a time.
_BLOCK_TILES = 1024


def choose_head_tile(num_rows: int, weight_dtype: torch.dtype) -> Tile:
    """The tile for [num_rows, K] x [V, K], V being large. Measured on an H200."""
    if weight_dtype == torch.float32:
        return Tile(block_n=32, block_k=32)
    if weight_dtype == torch.float8_e4m3fn:
        return choose_tile(num_rows, 1 << 16, 1, weight_dtype)
    return Tile(128, 128, num_stages=3) if num_rows <= 64 else Tile(128, 64, num_warps=8, num_stages=4)


def argmax_linear(
    x: torch.Tensor,  # [M, K], M = R*Q if num_query_rows is given; rows of a `Normed` do
    weight: torch.Tensor,  # [V, K]; fp16, bf16, fp32 or float8_e4m3fn
    *,
    weight_scale: torch.Tensor | None = None,  # [V] fp32
    row_ids: torch.Tensor | None = None,  # [V] int64; what to return for each row of the weight, instead of its index
    num_query_rows: int | None = None,  # Q: leave out the first row of every request, its anchor
    out: torch.Tensor | None = None,  # [M] or [R*(Q-1)] int64
    tile: Tile | None = None,
) -> torch.Tensor:
    """Index of the largest logit of every row, [M] or [R*(Q-1)] int64; of equal ones the lowest."""
    num_rows, vocab_size = x.shape[0], weight.shape[0]
    skip = num_query_rows or 0
    if skip:
        assert skip > 1 and num_rows % skip == 0, f"{num_rows} rows are not requests of {skip}"
        num_rows = num_rows // skip * (skip - 1)
    if out is None:
        out = torch.empty(num_rows, dtype=torch.int64, device=x.device)
    check_operands(x, weight, weight_scale)
    assert out.shape == (num_rows,) and out.dtype == torch.int64 and out.is_contiguous(), f"{tuple(out.shape)}"
    assert row_ids is None or (row_ids.shape == (vocab_size,) and row_ids.is_contiguous()), "one id a row"
    if num_rows == 0:
        return out

    tile = tile or choose_head_tile(num_rows, weight.dtype)
    assert tile.split_k == 1, "a maximum needs whole sums"
    block_m = block_rows(num_rows)
    tiles = triton.cdiv(vocab_size, tile.block_n)
    values = torch.empty((num_rows, tiles), dtype=torch.float32, device=x.device)
    indices = torch.empty((num_rows, tiles), dtype=torch.int32, device=x.device)
    _tile_max_kernel[(triton.cdiv(num_rows, block_m), tiles)](
        x,
        weight,
        weight_scale,
        values,
        indices,
        num_rows,
        x.stride(0),
        weight.stride(0),
        V=vocab_size,
        K=x.shape[1],
        Q=skip,
        HAS_SCALE=weight_scale is not None,
        BLOCK_M=block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        WEIGHTS_LEFT=tile.weights_left,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    _reduce_tiles_kernel[(num_rows,)](
        values, indices, row_ids, out, TILES=tiles, HAS_IDS=row_ids is not None, BLOCK=_BLOCK_TILES, num_warps=4
    )
    return out


# The number of rows changes from step to step: specialising on its divisibility would compile again and again.
@triton.jit(do_not_specialize=["num_rows"])
def _tile_max_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [V, K]
    scale_ptr,  # [V]; read only if HAS_SCALE
    out_values_ptr,  # [rows, tiles] fp32
    out_indices_ptr,  # [rows, tiles] int32
    num_rows,  # without anchors
    x_stride,
    weight_stride,
    V: tl.constexpr,
    K: tl.constexpr,
    Q: tl.constexpr,  # 0: every row counts
    HAS_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WEIGHTS_LEFT: tl.constexpr,
):
    # Programs that share a weight tile stand next to each other, so that one of them reads it from memory.
    row_tile, tile = tl.program_id(0), tl.program_id(1)

    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    x_rows = rows
    if Q > 0:
        x_rows = rows // (Q - 1) * Q + 1 + rows % (Q - 1)
    ids = weight_rows(tile, V, BLOCK_N, False)
    logits = stream_product(
        x_ptr + x_rows.to(tl.int64) * x_stride,
        row_mask,
        weight_ptr + ids * weight_stride,
        0,
        K,
        K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        WEIGHTS_LEFT,
    )
    if HAS_SCALE:
        logits *= tl.load(scale_ptr + ids)[None, :]
    # Rows past the end repeat the last one, and the first of equals wins: no mask needed.
    values, index = tl.max(logits, axis=1, return_indices=True, return_indices_tie_break_left=True)
    offsets = rows.to(tl.int64) * tl.num_programs(1) + tile
    tl.store(out_values_ptr + offsets, values, mask=row_mask)
    tl.store(out_indices_ptr + offsets, tl.minimum(tile * BLOCK_N + index, V - 1), mask=row_mask)


@triton.jit
def _reduce_tiles_kernel(
    values_ptr,  # [rows, TILES]
    indices_ptr,  # [rows, TILES]
    ids_ptr,  # [V]; read only if HAS_IDS
    out_ptr,  # [rows] int64
    TILES: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    values_ptr += row.to(tl.int64) * TILES
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_tile = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, TILES, BLOCK):
        tiles = first + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + tiles, mask=tiles < TILES, other=float("-inf"))
        # Strictly larger, so that each lane keeps its lowest tile.
        better = values > best
        best = tl.where(better, values, best)
        best_tile = tl.where(better, tiles, best_tile)
    top = tl.max(best, axis=0)
    tile = tl.min(tl.where(best == top, best_tile, TILES - 1), axis=0)
    winner = tl.load(indices_ptr + row.to(tl.int64) * TILES + tile).to(tl.int64)
    if HAS_IDS:
        winner = tl.load(ids_ptr + winner).to(tl.int64)
    tl.store(out_ptr + row, winner)


def reference_argmax_linear(
    x: torch.Tensor,  # [M, K]
    weight: torch.Tensor,  # [V, K]
    *,
    weight_scale: torch.Tensor | None = None,  # [V]
    row_ids: torch.Tensor | None = None,  # [V]
    num_query_rows: int | None = None,
) -> torch.Tensor:
    """The same as `argmax_linear`, with the logits in full. Logits that are nearly equal may be decided otherwise."""
    if num_query_rows:
        x = x.unflatten(0, (-1, num_query_rows))[:, 1:].flatten(0, 1)
    logits = F.linear(x, weight.to(x.dtype)).float()
    if weight_scale is not None:
        logits = logits * weight_scale
    ids = logits.max(dim=1).indices
    return ids if row_ids is None else row_ids[ids].long()
