# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""An RMSNorm in two halves, so that neither needs a launch or a pass of its own.

RMSNorm(x) @ W is ((x * norm weight) @ W) / rms(x). Who writes x multiplies it by the norm's weight and adds up the
squares; the product that follows divides its sums. Only rows that no kernel of this package wrote take `norm_rows`, and
only those that no product of this package reads take `divide_rows`.

Letters: M rows, K columns, P parts of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.triton_utils import tl, triton


@dataclass(frozen=True)
class Normed:
    """Rows on their way through an RMSNorm: still to be divided by their root mean square."""

    rows: torch.Tensor  # [M, K] x * norm weight, in fp32 rounded once
    squares: torch.Tensor  # [P, M] fp32; parts that add up to a row's sum of squares of x
    eps: float

    def __post_init__(self) -> None:
        num_rows = self.rows.shape[0]
        assert self.squares.dim() == 2 and self.squares.shape[1] == num_rows, f"{tuple(self.squares.shape)}"
        assert self.squares.dtype == torch.float32 and self.squares.is_contiguous(), f"{self.squares.dtype}"


def norm_rows(
    x: torch.Tensor,  # [M, K]
    weight: torch.Tensor,  # [K]
    eps: float,
) -> Normed:
    """The first half of an RMSNorm, in a launch of its own."""
    num_rows, k = x.shape
    assert x.stride(1) == 1 and weight.shape == (k,) and weight.is_contiguous(), f"{tuple(weight.shape)}"
    rows = torch.empty((num_rows, k), dtype=x.dtype, device=x.device)
    squares = torch.empty((1, num_rows), dtype=torch.float32, device=x.device)
    if num_rows:
        _norm_rows_kernel[(num_rows,)](
            x, weight, rows, squares, x.stride(0), K=k, BLOCK_K=triton.next_power_of_2(k), num_warps=8
        )
    return Normed(rows, squares, eps)


def divide_rows(normed: Normed) -> torch.Tensor:
    """The second half, where no product follows: [M, K]."""
    num_rows, k = normed.rows.shape
    out = torch.empty_like(normed.rows)
    parts = normed.squares.shape[0]
    if num_rows:
        _divide_rows_kernel[(num_rows,)](
            normed.rows,
            normed.squares,
            out,
            normed.eps,
            num_rows,
            normed.rows.stride(0),
            out.stride(0),
            K=k,
            PARTS=parts,
            BLOCK_PARTS=triton.next_power_of_2(parts),
            BLOCK_K=triton.next_power_of_2(k),
            num_warps=8,
        )
    return out


@triton.jit
def scaled_and_squares(
    x,  # [M, N], rounded to its type
    weight,  # [N]
):
    """x * weight [M, N], of x's type, and the sums of squares [M] fp32."""
    wide = x.to(tl.float32)
    return (wide * weight.to(tl.float32)[None, :]).to(x.dtype), tl.sum(wide * wide, axis=1)


@triton.jit
def inverse_rms(
    squares_ptr,  # [PARTS, M]
    rows,  # [N]
    row_mask,  # [N]
    num_rows,
    eps,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """1 / root mean square of rows of K elements, [N] fp32. Parts are added in one order, whatever the rows."""
    parts = tl.arange(0, BLOCK_PARTS)
    mask = (parts < PARTS)[:, None] & row_mask[None, :]
    squares = tl.load(squares_ptr + parts[:, None] * num_rows + rows[None, :], mask=mask, other=0.0)
    return tl.rsqrt(tl.sum(squares, axis=0) / K + eps)


@triton.jit
def _norm_rows_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [K]
    rows_ptr,  # [M, K]
    squares_ptr,  # [M]
    x_stride,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    mask = columns < K
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0)
    scaled, squares = scaled_and_squares(x[None, :], tl.load(weight_ptr + columns, mask=mask, other=0.0))
    tl.store(rows_ptr + row * K + columns[None, :], scaled, mask=mask[None, :])
    tl.store(squares_ptr + row + tl.arange(0, 1), squares)


@triton.jit(do_not_specialize=["num_rows"])
def _divide_rows_kernel(
    rows_ptr,  # [M, K]
    squares_ptr,  # [PARTS, M]
    out_ptr,  # [M, K]
    eps,
    num_rows,
    rows_stride,
    out_stride,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    mask = columns < K
    rows = tl.load(rows_ptr + row * rows_stride + columns, mask=mask, other=0.0).to(tl.float32)
    one = row + tl.zeros([1], tl.int64)
    scale = inverse_rms(squares_ptr, one, one < num_rows, num_rows, eps, K, PARTS, BLOCK_PARTS)
    divided = rows[None, :] * scale[:, None]
    tl.store(out_ptr + row * out_stride + columns[None, :], divided.to(out_ptr.dtype.element_ty), mask=mask[None, :])


def reference_norm_rows(
    x: torch.Tensor,  # [M, K]
    weight: torch.Tensor,  # [K]
    eps: float,
) -> Normed:
    """The same as `norm_rows`, in plain torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return Normed((wide * weight).to(x.dtype), wide.square().sum(dim=1)[None].float(), eps)
