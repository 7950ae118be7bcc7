# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Rows of several tensors side by side, in one launch: context features of the rows that a drafter reads.

Letters: C rows to gather, T rows there are, F tensors, H columns of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from vllm.triton_utils import tl, triton
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_dflash.kernels.repeated_launch import RepeatedLaunch

_BLOCK = 1024


def gather_features(
    out: torch.Tensor,  # [C, F*H], written
    states: Sequence[torch.Tensor],  # F tensors [T, H]
    rows: torch.Tensor,  # [C] which of the T
) -> None:
    """`torch.cat([each[rows] for each in states], dim=-1, out=out)`."""
    first = states[0]
    width, num_rows = first.shape[1], len(rows)
    assert out.shape == (num_rows, len(states) * width) and out.stride(1) == 1, f"{tuple(out.shape)}"
    assert all(each.stride() == first.stride() and each.dtype == out.dtype for each in states)
    assert first.stride(1) == 1, f"strides {first.stride()}"
    if num_rows:
        addresses = _addresses(tuple(each.data_ptr() for each in states), out.device)
        _gather_features_kernel[(num_rows, len(states), triton.cdiv(width, _BLOCK))](
            out, addresses, rows, out.stride(0), first.stride(0), H=width, BLOCK=_BLOCK
        )


@lru_cache(maxsize=64)
def _addresses(pointers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """[F] on the device. A CUDA graph's outputs are always in the same memory, so these are few."""
    return async_tensor_h2d(list(pointers), dtype=torch.int64, device=device)


@RepeatedLaunch
@triton.jit
def _gather_features_kernel(
    out_ptr,  # [C, F*H]
    addresses_ptr,  # [F]
    rows_ptr,  # [C]
    out_stride,
    states_stride,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place, tensor = tl.program_id(0), tl.program_id(1)
    columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < H
    states_ptr = tl.load(addresses_ptr + tensor).to(tl.pointer_type(out_ptr.dtype.element_ty))
    row = tl.load(rows_ptr + place).to(tl.int64)
    states = tl.load(states_ptr + row * states_stride + columns, mask=mask)
    tl.store(out_ptr + place.to(tl.int64) * out_stride + tensor * H + columns, states, mask=mask)
