# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""A linear layer for few rows, as fast as its weights can be read; norms, scale, SwiGLU and residual ride along.

With up to 64 rows a product costs what its weights cost to read once, so all else is arranged around that: every SM
keeps enough reads in flight, and nothing but the product is in the loop. The RMSNorm before it divides the sums at the
end, and the one after it is begun where the result is written (`rms_norm.py`). (Starting a kernel while its predecessor
drains, and prefetching its weights to L2, were measured on an H200: both made a chain of these slower.)

A program multiplies BLOCK_N weight rows with all input rows, over one of SPLIT_K parts of K. The input is read again by
each program that shares a part, so tall tiles and several parts keep that traffic small beside the weights. Of the
programs that share a tile the last to arrive adds the parts up in their order: the result does not depend on who it is.

Letters: M rows, N weight rows (output columns), K weight columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch.nn import functional as F
from vllm.triton_utils import tl, triton

from vllm_dflash.kernels.rms_norm import Normed, inverse_rms, scaled_and_squares

#: Up to here a product is bound by reading its weights; above, by arithmetic, and cuBLAS is as fast.
MAX_SKINNY_ROWS = 64
#: Programs that fill an H200 (132 SMs) once.
_FULL_GRID = 120
#: Tiles of one launch that can share their counters.
_MAX_TILES = 1 << 16


@dataclass(frozen=True)
class Tile:
    """How a product is cut up. The bytes in flight on an SM are about num_stages * block_n * block_k * weight bytes."""

    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3
    # Which operand of the matrix product the weights are. On the left they go from shared memory to Hopper's tensor
    # cores directly, 64 rows at a time. On the right they pass through registers, as converting them from FP8 asks for.
    weights_left: bool = True


def choose_tile(num_rows: int, n: int, k: int, weight_dtype: torch.dtype) -> Tile:
    """The tile for [num_rows, k] x [n, k]. Measured on an H200, for the shapes of an 8B target's drafter.

    What decides is that all programs fit the device at once, each with 64 KiB and more of weights in flight.
    """
    if weight_dtype == torch.float32:
        return Tile(block_n=32, block_k=32)
    if weight_dtype == torch.float8_e4m3fn:
        if num_rows <= 32:
            return Tile(128, 256, _split_k(n, 128, k, 256), num_stages=3, weights_left=False)
        # More rows and as wide a step would spill registers.
        block_k = 128 if num_rows <= 64 else 64
        return Tile(128, block_k, _split_k(n, 128, k, block_k), num_warps=8, num_stages=4, weights_left=False)
    if n >= _FULL_GRID * 128:
        return Tile(block_n=128, block_k=64, num_stages=4)
    if n < _FULL_GRID * 64:
        return Tile(64, 128, _split_k(n, 64, k, 128), num_stages=6 if num_rows <= 32 else 4)
    if num_rows <= 64:
        return Tile(128, 128, _split_k(n, 128, k, 128), num_warps=8, num_stages=3)
    return Tile(128, 64, _split_k(n, 128, k, 64), num_stages=4)


def _split_k(n: int, block_n: int, k: int, block_k: int) -> int:
    """Parts of K: as many as fill the device, while each keeps a few steps."""
    parts = 1
    while triton.cdiv(n, block_n) * parts < _FULL_GRID * 3 // 4 and k >= 2 * parts * 4 * block_k:
        parts *= 2
    return parts


def skinny_linear(
    x: torch.Tensor | Normed,  # [M, K]
    weight: torch.Tensor,  # [N, K]; fp16, bf16, fp32 or float8_e4m3fn
    *,
    weight_scale: torch.Tensor | None = None,  # [N] fp32
    residual: torch.Tensor | None = None,  # [M, N]; added to the product
    silu_and_mul: bool = False,  # the weight's halves are [gate; up]: silu(gate) * up
    out: torch.Tensor | None = None,  # [M, N] or, with silu_and_mul, [M, N/2]; may be `residual`
    tile: Tile | None = None,
    counters: torch.Tensor | None = None,  # of `new_counters`; needed by launches that may overlap with others
) -> torch.Tensor:
    """`x @ weight.T` with what stands around it, [M, N] or [M, N/2]. Products add up in fp32 and are rounded once.

    An FP8 weight is multiplied as x's type, exactly, and its scale applied to the sum.
    """
    return _launch(x, weight, weight_scale, residual, silu_and_mul, out, tile, counters, None)[0]


def skinny_linear_normed(
    x: torch.Tensor | Normed,  # [M, K]
    weight: torch.Tensor,  # [N, K]
    norm_weight: torch.Tensor,  # [N]
    eps: float,
    *,
    weight_scale: torch.Tensor | None = None,  # [N] fp32
    residual: torch.Tensor | None = None,  # [M, N]; added to the product
    out: torch.Tensor | None = None,  # [M, N]; may be `residual`
    tile: Tile | None = None,
    counters: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Normed]:
    """What `skinny_linear` gives, and the same on its way through the norm that follows."""
    out, normed = _launch(x, weight, weight_scale, residual, False, out, tile, counters, (norm_weight, eps))
    assert normed is not None
    return out, normed


def _launch(
    x: torch.Tensor | Normed,  # [M, K]
    weight: torch.Tensor,  # [N, K]
    weight_scale: torch.Tensor | None,  # [N]
    residual: torch.Tensor | None,  # [M, N]
    silu_and_mul: bool,
    out: torch.Tensor | None,  # [M, N] or [M, N/2]
    tile: Tile | None,
    counters: torch.Tensor | None,
    next_norm: tuple[torch.Tensor, float] | None,  # weight [N] and eps
) -> tuple[torch.Tensor, Normed | None]:
    norm, x = (x, x.rows) if isinstance(x, Normed) else (None, x)
    (num_rows, k), n = x.shape, weight.shape[0]
    out_columns = n // 2 if silu_and_mul else n
    if out is None:
        out = torch.empty((num_rows, out_columns), dtype=x.dtype, device=x.device)
    _check(x, weight, weight_scale, residual, out, out_columns)
    tile = tile or choose_tile(num_rows, n, k, weight.dtype)
    block_m = block_rows(num_rows)
    tiles, row_tiles = triton.cdiv(n, tile.block_n), triton.cdiv(num_rows, block_m)
    normed = None
    if next_norm is not None:
        norm_weight, eps = next_norm
        assert norm_weight.shape == (n,) and norm_weight.is_contiguous(), f"{tuple(norm_weight.shape)}"
        normed = Normed(
            torch.empty((num_rows, n), dtype=x.dtype, device=x.device),
            torch.empty((tiles, num_rows), dtype=torch.float32, device=x.device),
            eps,
        )
    if num_rows == 0:
        return out, normed
    partial, counters = _split_buffers(tile, tiles * row_tiles, block_m, x.device, counters)
    norm_parts = norm.squares.shape[0] if norm is not None else 0
    _skinny_linear_kernel[(row_tiles, tiles, tile.split_k)](
        x,
        weight,
        weight_scale,
        norm.squares if norm is not None else None,
        residual,
        out,
        next_norm[0] if next_norm is not None else None,
        normed.rows if normed is not None else None,
        normed.squares if normed is not None else None,
        partial,
        counters,
        num_rows,
        x.stride(0),
        weight.stride(0),
        residual.stride(0) if residual is not None else 0,
        out.stride(0),
        norm.eps if norm is not None else 0.0,
        N=n,
        K=k,
        K_PART=triton.cdiv(triton.cdiv(k, tile.block_k), tile.split_k) * tile.block_k,
        NORM_PARTS=norm_parts,
        HAS_SCALE=weight_scale is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_NEXT_NORM=next_norm is not None,
        SILU_AND_MUL=silu_and_mul,
        BLOCK_M=block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        BLOCK_PARTS=triton.next_power_of_2(max(norm_parts, 1)),
        SPLIT_K=tile.split_k,
        WEIGHTS_LEFT=tile.weights_left,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out, normed


def block_rows(num_rows: int) -> int:
    """Input rows that one program multiplies: all, up to 128."""
    return min(128, max(16, triton.next_power_of_2(num_rows)))


def _check(
    x: torch.Tensor,  # [M, K]
    weight: torch.Tensor,  # [N, K]
    weight_scale: torch.Tensor | None,  # [N]
    residual: torch.Tensor | None,  # [M, N]
    out: torch.Tensor,  # [M, N] or [M, N/2]
    out_columns: int,
) -> None:
    num_rows, n = x.shape[0], weight.shape[0]
    check_operands(x, weight, weight_scale)
    assert out.shape == (num_rows, out_columns) and out.stride(1) == 1, f"{tuple(out.shape)}, strides {out.stride()}"
    if out_columns != n:
        assert n % 2 == 0 and residual is None, "silu_and_mul halves the columns and takes no residual"
    if residual is not None:
        assert residual.shape == (num_rows, n) and residual.stride(1) == 1, f"{tuple(residual.shape)}"
    # Other programs still read x when the first one writes.
    assert num_rows == 0 or out.data_ptr() != x.data_ptr(), "out must not be x"


def check_operands(
    x: torch.Tensor,  # [M, K]
    weight: torch.Tensor,  # [N, K]
    weight_scale: torch.Tensor | None,  # [N]
) -> None:
    """What every product here asks of its operands."""
    k, n = x.shape[1], weight.shape[0]
    assert weight.shape == (n, k), f"x {tuple(x.shape)}, weight {tuple(weight.shape)}"
    assert x.stride(1) == 1 and weight.stride(1) == 1, f"strides {x.stride()}, {weight.stride()}"
    assert weight.dtype in (x.dtype, torch.float8_e4m3fn), f"x is {x.dtype}, weight {weight.dtype}"
    if weight_scale is not None:
        assert weight_scale.shape == (n,) and weight_scale.dtype == torch.float32 and weight_scale.is_contiguous()


def _split_buffers(
    tile: Tile, num_tiles: int, block_m: int, device: torch.device, counters: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Where programs that share a tile leave their part of the product, and a counter for each tile."""
    if tile.split_k == 1:
        return None, None
    assert num_tiles <= _MAX_TILES, f"{num_tiles} tiles"
    size = num_tiles * tile.split_k * tile.block_n * block_m
    partial = torch.empty(size, dtype=torch.float32, device=device)
    return partial, _shared_counters(device) if counters is None else counters


def new_counters(device: torch.device) -> torch.Tensor:
    """How many programs of a tile have arrived: zeros, which every launch leaves as zeros.

    Clearing them by a launch of their own would cost as much as a norm. Launches that may run at the same time need
    counters of their own.
    """
    return torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)


@cache
def _shared_counters(device: torch.device) -> torch.Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("skinny_linear: run it once before it is captured in a CUDA graph")
    return new_counters(device)


@triton.jit
def weight_rows(
    tile,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAIRED: tl.constexpr,  # half of a tile's rows are gate rows, the other half the up rows that belong to them
):
    """Rows of the weight in this tile, [BLOCK_N] int64. Past the end rows repeat: their sums are not stored."""
    index = tl.arange(0, BLOCK_N)
    if PAIRED:
        row = tl.minimum(tile * (BLOCK_N // 2) + index % (BLOCK_N // 2), N // 2 - 1)
        rows = tl.where(index < BLOCK_N // 2, row, row + N // 2)
    else:
        rows = tl.minimum(tile * BLOCK_N + index, N - 1)
    return rows.to(tl.int64)


@triton.jit
def _as(
    weight,
    dtype: tl.constexpr,
):
    """FP8 numbers as another type, exactly. By way of fp32: straight to bf16 goes through the slowest unit of an SM."""
    if weight.dtype.primitive_bitwidth == 8:
        return weight.to(tl.float16).to(tl.float32).to(dtype)
    else:
        return weight


@triton.jit
def stream_product(
    x_rows,  # [BLOCK_M] pointers
    row_mask,  # [BLOCK_M]
    weight_row_ptrs,  # [BLOCK_N] pointers
    start,
    end,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WEIGHTS_LEFT: tl.constexpr,
):
    """Input x weight over columns [start, end), [BLOCK_M, BLOCK_N] fp32."""
    # On the right, tensor cores take the few input rows 16 at a time; on the left, the weights 64 at a time.
    acc = tl.zeros((BLOCK_N if WEIGHTS_LEFT else BLOCK_M, BLOCK_M if WEIGHTS_LEFT else BLOCK_N), tl.float32)
    for first in range(start, end, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)
        x_ptrs = x_rows[:, None] + columns[None, :]
        weight_ptrs = weight_row_ptrs[:, None] + columns[None, :]
        if K % BLOCK_K == 0:
            x = tl.load(x_ptrs, mask=row_mask[:, None], other=0.0)
            weight = tl.load(weight_ptrs)
        else:
            inside = (columns < K)[None, :]
            x = tl.load(x_ptrs, mask=row_mask[:, None] & inside, other=0.0)
            weight = tl.load(weight_ptrs, mask=inside, other=0.0)
        weight = _as(weight, x.dtype)
        # "ieee": TF32 would round fp32 to little more than bf16.
        if WEIGHTS_LEFT:
            acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
        else:
            acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
    if WEIGHTS_LEFT:
        acc = tl.trans(acc)
    return acc


@triton.jit
def _store_tile(
    acc,  # [BLOCK_M, BLOCK_N] fp32
    tile,
    rows,  # [BLOCK_M] int64
    row_mask,  # [BLOCK_M]
    num_rows,
    scale_ptr,
    squares_ptr,
    residual_ptr,
    out_ptr,
    next_norm_ptr,
    next_rows_ptr,
    next_squares_ptr,
    residual_stride,
    out_stride,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM_PARTS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NEXT_NORM: tl.constexpr,
    SILU_AND_MUL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + weight_rows(tile, N, BLOCK_N, SILU_AND_MUL))[None, :]
    if NORM_PARTS > 0:
        acc *= inverse_rms(squares_ptr, rows, row_mask, num_rows, eps, K, NORM_PARTS, BLOCK_PARTS)[:, None]
    if SILU_AND_MUL:
        columns = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        mask = row_mask[:, None] & (columns < N // 2)[None, :]
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        acc = gate * tl.sigmoid(gate) * up
    else:
        columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = row_mask[:, None] & (columns < N)[None, :]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + rows[:, None] * residual_stride + columns[None, :], mask=mask, other=0.0)
        acc += residual.to(tl.float32)
    result = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * out_stride + columns[None, :], result, mask=mask)
    if HAS_NEXT_NORM:
        norm_weight = tl.load(next_norm_ptr + columns, mask=columns < N, other=0.0)
        scaled, squares = scaled_and_squares(tl.where(mask, result, 0.0), norm_weight)
        tl.store(next_rows_ptr + rows[:, None] * N + columns[None, :], scaled, mask=mask)
        tl.store(next_squares_ptr + tile * num_rows + rows, squares, mask=row_mask)


# The number of rows changes from step to step: specialising on its divisibility would compile again and again.
@triton.jit(do_not_specialize=["num_rows"])
def _skinny_linear_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K]
    scale_ptr,  # [N]; read only if HAS_SCALE
    squares_ptr,  # [NORM_PARTS, M] fp32; read only if NORM_PARTS > 0
    residual_ptr,  # [M, N]; read only if HAS_RESIDUAL
    out_ptr,  # [M, N] or [M, N/2]
    next_norm_ptr,  # [N]; read only if HAS_NEXT_NORM
    next_rows_ptr,  # [M, N]; written only if HAS_NEXT_NORM, as the next one
    next_squares_ptr,  # [tiles, M] fp32
    partial_ptr,  # [row tiles, tiles, SPLIT_K, BLOCK_M, BLOCK_N] fp32; used only if SPLIT_K > 1, as the next one
    arrived_ptr,  # [row tiles, tiles] int32, zeros
    num_rows,
    x_stride,
    weight_stride,
    residual_stride,
    out_stride,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    K_PART: tl.constexpr,
    NORM_PARTS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NEXT_NORM: tl.constexpr,
    SILU_AND_MUL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    WEIGHTS_LEFT: tl.constexpr,
):
    row_tile, tile, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = part * K_PART
    end = tl.minimum(start + K_PART, K)
    rows = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    row_mask = rows < num_rows
    weight_row_ptrs = weight_ptr + weight_rows(tile, N, BLOCK_N, SILU_AND_MUL) * weight_stride
    acc = stream_product(
        x_ptr + rows * x_stride,
        row_mask,
        weight_row_ptrs,
        start,
        end,
        K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        WEIGHTS_LEFT,
    )
    finish = True
    index = row_tile * tl.num_programs(1) + tile
    if SPLIT_K > 1:
        offsets = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        first = index.to(tl.int64) * SPLIT_K
        tl.store(partial_ptr + (first + part) * (BLOCK_N * BLOCK_M) + offsets, acc)
        # All threads' parts before the count, and the count before anyone reads the others' parts.
        tl.debug_barrier()
        finish = tl.atomic_add(arrived_ptr + index, 1, sem="acq_rel") == SPLIT_K - 1
        if finish:
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for other in tl.static_range(SPLIT_K):
                # .cg: past L1, which is not coherent.
                acc += tl.load(partial_ptr + (first + other) * (BLOCK_N * BLOCK_M) + offsets, cache_modifier=".cg")
            tl.store(arrived_ptr + index, 0)
    if finish:
        _store_tile(
            acc,
            tile,
            rows,
            row_mask,
            num_rows,
            scale_ptr,
            squares_ptr,
            residual_ptr,
            out_ptr,
            next_norm_ptr,
            next_rows_ptr,
            next_squares_ptr,
            residual_stride,
            out_stride,
            eps,
            N,
            K,
            NORM_PARTS,
            HAS_SCALE,
            HAS_RESIDUAL,
            HAS_NEXT_NORM,
            SILU_AND_MUL,
            BLOCK_M,
            BLOCK_N,
            BLOCK_PARTS,
        )


def reference_skinny_linear(
    x: torch.Tensor,  # [M, K]
    weight: torch.Tensor,  # [N, K]
    *,
    weight_scale: torch.Tensor | None = None,  # [N]
    norm_weight: torch.Tensor | None = None,  # [K]
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,  # [M, N]
    silu_and_mul: bool = False,
) -> torch.Tensor:
    """As a model without `skinny_linear` would compute it: step by step, from the norm on, each rounded to x's type."""
    if norm_weight is not None:
        x = F.rms_norm(x, (x.shape[1],), norm_weight.to(x.dtype), eps)
    weight = weight.to(x.dtype)
    if weight_scale is not None:
        weight = (weight * weight_scale[:, None]).to(x.dtype)
    out = F.linear(x, weight)
    if silu_and_mul:
        gate, up = out.chunk(2, dim=1)
        out = F.silu(gate) * up
    return out if residual is None else out + residual
