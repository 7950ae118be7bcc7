# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Accepted rows of trees become consecutive in the paged caches of all layers, in one launch for each cache group.

Letters: R requests, T rows of the step, S rows of the runner's state, D depths, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.triton_utils import tl, triton

from vllm_dflash.kernels.repeated_launch import RepeatedLaunch


@dataclass(frozen=True)
class KVCaches:
    """The caches of layers that share a slot mapping, for a kernel that serves them all."""

    addresses: torch.Tensor  # [L] int64 on the device
    tensors: tuple[torch.Tensor, ...]  # L caches [blocks, K/V heads, block size, 2*head size] by strides; held

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> KVCaches:
        """Raises ValueError where their layouts differ or a row of one head is not contiguous."""
        first = tensors[0]
        layouts = {(tuple(cache.shape[1:]), cache.stride(), cache.dtype) for cache in tensors}
        if len(layouts) > 1 or first.dim() != 4 or first.stride(3) != 1:
            raise ValueError(f"the K/V caches of a group must be alike and have contiguous rows, found {layouts}")
        addresses = torch.tensor([cache.data_ptr() for cache in tensors], dtype=torch.int64, device=first.device)
        return cls(addresses, tuple(tensors))


def move_accepted_kv(
    caches: KVCaches,
    slot_mapping: torch.Tensor,  # [>= T] int64
    way: torch.Tensor,  # [S, D] int32; accepted rows of a verification, the root's being 0
    state_rows: torch.Tensor,  # [R]
    query_start_loc: torch.Tensor,  # [>= R+1]
    cu_num_logits: torch.Tensor,  # [R+1]
    num_sampled: torch.Tensor,  # [R] accepted rows and one more
) -> None:
    """Row `way[j]` of each verification goes to row 1 + j. All of a request is read before anything is written."""
    cache, num_depths = caches.tensors[0], way.shape[1]
    _, num_heads, block_size, width = cache.shape
    _move_kv_kernel[(len(state_rows), len(caches.tensors), num_heads)](
        caches.addresses,
        cache,
        slot_mapping,
        way,
        state_rows,
        query_start_loc,
        cu_num_logits,
        num_sampled,
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        BLOCK_SIZE=block_size,
        WIDTH=width,
        BLOCK_WIDTH=triton.next_power_of_2(width),
        D=num_depths,
        BLOCK_D=triton.next_power_of_2(num_depths),
    )


@RepeatedLaunch
@triton.jit
def _move_kv_kernel(
    addresses_ptr,  # [L]
    any_cache_ptr,  # of which only the type is read
    slot_mapping_ptr,  # [T]
    way_ptr,  # [S, D]
    state_rows_ptr,  # [R]
    query_start_loc_ptr,  # [R+1]
    cu_num_logits_ptr,  # [R+1]
    num_sampled_ptr,  # [R]
    block_stride,
    head_stride,
    slot_stride,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    request, layer, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_logits = tl.load(cu_num_logits_ptr + request + 1) - tl.load(cu_num_logits_ptr + request)
    num_accepted = tl.minimum(tl.load(num_sampled_ptr + request), num_logits) - 1
    if num_accepted <= 0:
        return
    root = (tl.load(query_start_loc_ptr + request + 1) - num_logits).to(tl.int64)
    state_row = tl.load(state_rows_ptr + request).to(tl.int64)
    places = tl.arange(0, BLOCK_D)
    is_accepted = places < num_accepted
    way = tl.load(way_ptr + state_row * D + places, mask=is_accepted, other=0)
    moves = is_accepted & (way != places + 1)
    if tl.sum(moves.to(tl.int32), axis=0) == 0:
        return
    sources = tl.load(slot_mapping_ptr + root + way, mask=moves, other=0)
    targets = tl.load(slot_mapping_ptr + root + 1 + places, mask=moves, other=0)
    columns = tl.arange(0, BLOCK_WIDTH)
    cache_ptr = tl.load(addresses_ptr + layer).to(tl.pointer_type(any_cache_ptr.dtype.element_ty))
    cache_ptr += head.to(tl.int64) * head_stride
    mask = moves[:, None] & (columns < WIDTH)[None, :]
    source_rows = sources // BLOCK_SIZE * block_stride + sources % BLOCK_SIZE * slot_stride
    target_rows = targets // BLOCK_SIZE * block_stride + targets % BLOCK_SIZE * slot_stride
    states = tl.load(cache_ptr + source_rows[:, None] + columns[None, :], mask=mask)
    tl.debug_barrier()  # other threads read what these write
    tl.store(cache_ptr + target_rows[:, None] + columns[None, :], states, mask=mask)
