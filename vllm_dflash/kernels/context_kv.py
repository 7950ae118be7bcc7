# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""From the projections of the context rows to K/V in the paged caches of all draft layers, in one launch.

Between the matrix product and the caches nothing is computed twice and nothing is stored in between: a row's key is
read, normed, rotated and written, its value read and written. Bound by memory.

Letters: T context rows, L draft layers, D head size, G KV-cache groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.triton_utils import tl, triton

_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0

#: Entries of a layer in `LayerCaches.fields`, in this order: address of the cache; strides, in elements, of a block, a
#: head and a slot; slots in a block; cache group; addresses of the scales of keys and of values.
_NUM_FIELDS = 8

#: How many elements of K (and of V) a program takes, and from how many rows on it takes several rows to that end.
_MAX_ELEMENTS, _MANY_ROWS = 4096, 256


@dataclass(frozen=True)
class LayerCaches:
    """Where the caches of all draft layers are, for a kernel that writes them all. Built once, not once a step.

    The tensors are held, since the kernel only knows their addresses.
    """

    fields: torch.Tensor  # [L, 8] int64 on the device
    tensors: tuple[torch.Tensor, ...]  # L caches [blocks, heads, slots in a block, 2*D]: keys, then values
    groups: tuple[int, ...]  # L
    k_scales: tuple[torch.Tensor, ...]  # L scalars of float32; empty unless the caches hold fp8
    v_scales: tuple[torch.Tensor, ...]
    is_aligned: bool  # each slot starts at a multiple of 16 bytes

    @classmethod
    def of(
        cls,
        kv_caches: Sequence[
            torch.Tensor
        ],  # L tensors [blocks, heads, slots in a block, 2*D], of any strides but the last
        group_of_layer: Sequence[int],  # L entries
        k_scales: Sequence[torch.Tensor] | None = None,  # L scalars of float32; a stored key is key / scale
        v_scales: Sequence[torch.Tensor] | None = None,
    ) -> LayerCaches:
        """Caches of one dtype. Those of uint8 hold fp8 (e4m3); scales count for fp8 only."""
        caches = tuple(cache.view(_FP8) if cache.dtype == torch.uint8 else cache for cache in kv_caches)
        is_fp8 = caches[0].dtype == _FP8
        for cache in caches:
            assert cache.dtype == caches[0].dtype and cache.shape[1::2] == caches[0].shape[1::2], "caches differ"
            assert cache.stride(3) == 1, f"strides {cache.stride()}"
        if is_fp8:
            assert k_scales is not None and v_scales is not None, "fp8 caches without scales"
            for scale in (*k_scales, *v_scales):
                assert scale.dtype == torch.float32 and scale.numel() == 1, f"{scale.dtype} {tuple(scale.shape)}"
                assert scale.device == caches[0].device, f"a scale on {scale.device}, caches on {caches[0].device}"
        kept_k, kept_v = (tuple(scales or ()) if is_fp8 else () for scales in (k_scales, v_scales))
        fields = [
            [
                cache.data_ptr(),
                *cache.stride()[:3],
                cache.shape[2],
                group,
                kept_k[layer].data_ptr() if is_fp8 else 0,
                kept_v[layer].data_ptr() if is_fp8 else 0,
            ]
            for layer, (cache, group) in enumerate(zip(caches, group_of_layer, strict=True))
        ]
        size = caches[0].element_size()
        starts = [start for cache in caches for start in (cache.data_ptr(), *(s * size for s in cache.stride()[:3]))]
        return cls(
            fields=torch.tensor(fields, dtype=torch.int64, device=caches[0].device),
            tensors=caches,
            groups=tuple(group_of_layer),
            k_scales=kept_k,
            v_scales=kept_v,
            is_aligned=all(start % 16 == 0 for start in starts),
        )

    @property
    def num_layers(self) -> int:
        return len(self.tensors)

    @property
    def num_kv_heads(self) -> int:
        return self.tensors[0].shape[1]

    @property
    def head_size(self) -> int:
        return self.tensors[0].shape[3] // 2

    @property
    def is_fp8(self) -> bool:
        return self.tensors[0].dtype == _FP8


def inject_context_kv(
    kv: torch.Tensor,  # [T, 2*L*heads*D] projections: keys of all layers, layer after layer, then all values
    k_norm_weight: torch.Tensor,  # [L, D], of kv's dtype
    eps: float,
    cos_sin_cache: torch.Tensor,  # [positions, rotary size]: cosines, then sines
    is_neox_style: bool,  # pairs are (i, i + half); otherwise (2i, 2i + 1)
    positions: torch.Tensor,  # [>=T] int64
    slot_mappings: torch.Tensor,  # [G, >=T] int64; a negative slot writes nothing
    caches: LayerCaches,
) -> None:
    """Norm each key with its layer's weight, rotate it at its row's position, write keys and values to their slots.

    Example: with 2 layers of one head of size 2, a row is [k of layer 0 (2), k of layer 1 (2), v of 0 (2), v of 1 (2)].
    """
    num_rows, rotary = kv.shape[0], cos_sin_cache.shape[1]
    head_size, num_heads = caches.head_size, caches.num_kv_heads
    assert kv.shape[1] == 2 * caches.num_layers * num_heads * head_size, f"{tuple(kv.shape)}"
    assert k_norm_weight.shape == (caches.num_layers, head_size), f"{tuple(k_norm_weight.shape)}"
    assert k_norm_weight.dtype == kv.dtype, f"{k_norm_weight.dtype}, {kv.dtype}"
    assert kv.stride(1) == cos_sin_cache.stride(1) == slot_mappings.stride(1) == positions.stride(0) == 1
    assert k_norm_weight.is_contiguous()
    assert 0 < rotary <= head_size and rotary % 2 == 0, f"rotary size {rotary} of head size {head_size}"
    assert positions.shape[0] >= num_rows and slot_mappings.shape[1] >= num_rows, "fewer positions or slots than rows"
    if num_rows == 0:
        return

    # Few rows: as many programs as possible. Many: several rows a program, so that its look-ups pay.
    heads = min(triton.next_power_of_2(num_heads), max(_MAX_ELEMENTS // triton.next_power_of_2(head_size), 1))
    rows = max(_MAX_ELEMENTS // (heads * triton.next_power_of_2(head_size)), 1) if num_rows >= _MANY_ROWS else 1
    grid = (triton.cdiv(num_rows, rows), caches.num_layers, triton.cdiv(num_heads, heads))
    _inject_context_kv_kernel[grid](
        kv,
        kv.stride(0),
        k_norm_weight,
        eps,
        cos_sin_cache,
        cos_sin_cache.stride(0),
        positions,
        slot_mappings,
        slot_mappings.stride(0),
        caches.fields,
        caches.tensors[0],
        num_rows,
        FP8_MAX=_FP8_MAX if caches.is_fp8 else None,
        NUM_HEADS=num_heads,
        HEAD_SIZE=head_size,
        ROTARY=rotary,
        IS_NEOX=is_neox_style,
        ALIGNED_ELEMENTS=16 // caches.tensors[0].element_size() if caches.is_aligned else 1,
        ROWS=rows,
        HEADS=heads,
        NUM_FIELDS=_NUM_FIELDS,
        HEAD_BLOCK=triton.next_power_of_2(head_size),
        PAIR_BLOCK=triton.next_power_of_2(rotary // 2),
        REST_BLOCK=triton.next_power_of_2(max(head_size - rotary, 1)),
    )


@triton.jit
def _store(
    ptrs,  # [M, N] into a cache
    values,  # [M, N] of kv's dtype
    scale,
    mask,  # [M, N]
    FP8_MAX: tl.constexpr,  # None: the cache holds what is computed
):
    if FP8_MAX is not None:
        values = values.to(tl.float32) / scale
        values = tl.minimum(tl.maximum(values, -FP8_MAX), FP8_MAX)
    tl.store(ptrs, values.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _normed(
    x,  # [M, N] float32: some of a head's elements
    rstd,  # [M]
    weight,  # [N]
):
    """Rounded once after the scaling and once after the weight, as the model's norm rounds. float32 [M, N]."""
    scaled = (x * rstd[:, None]).to(weight.dtype).to(tl.float32)
    return (scaled * weight.to(tl.float32)[None, :]).to(weight.dtype).to(tl.float32)


# A step may begin anywhere in a larger one's positions and slots: no other kernel for each alignment of theirs.
@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def _inject_context_kv_kernel(
    kv_ptr,  # [T, 2*L*heads*D]
    kv_stride,
    weight_ptr,  # [L, D]
    eps,
    cos_sin_ptr,  # [positions, ROTARY]
    cos_sin_stride,
    positions_ptr,  # [T]
    slots_ptr,  # [G, T]
    slots_stride,
    fields_ptr,  # [L, NUM_FIELDS]
    any_cache_ptr,  # one of the caches, for its dtype
    num_rows,
    FP8_MAX: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    IS_NEOX: tl.constexpr,
    ALIGNED_ELEMENTS: tl.constexpr,  # every address and stride of the caches is a multiple of so many elements
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    NUM_FIELDS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    # A program takes M = ROWS * HEADS heads of one layer: each line of a tile is one head of one row.
    layer = tl.program_id(1)
    lines = tl.arange(0, ROWS * HEADS)
    rows = tl.program_id(0).to(tl.int64) * ROWS + lines // HEADS
    heads = tl.program_id(2) * HEADS + lines % HEADS

    # First all that does not depend on the projections, which are what the kernel before this one computes.
    fields = fields_ptr + layer * NUM_FIELDS
    cache_ptr = tl.load(fields).to(any_cache_ptr.dtype)
    block_stride, head_stride, slot_stride = tl.load(fields + 1), tl.load(fields + 2), tl.load(fields + 3)
    # Read from memory, these would be taken for odd numbers and elements be stored one by one.
    cache_ptr = tl.multiple_of(cache_ptr, ALIGNED_ELEMENTS * any_cache_ptr.dtype.element_ty.primitive_bitwidth // 8)
    block_stride = tl.multiple_of(block_stride, ALIGNED_ELEMENTS)
    head_stride = tl.multiple_of(head_stride, ALIGNED_ELEMENTS)
    slot_stride = tl.multiple_of(slot_stride, ALIGNED_ELEMENTS)
    block_size, group = tl.load(fields + 4), tl.load(fields + 5)
    k_scale, v_scale = 1.0, 1.0
    if FP8_MAX is not None:
        k_scale = tl.load(tl.load(fields + 6).to(tl.pointer_type(tl.float32)))
        v_scale = tl.load(tl.load(fields + 7).to(tl.pointer_type(tl.float32)))
    slots = tl.load(slots_ptr + group * slots_stride + rows, mask=rows < num_rows, other=-1)
    keep = (slots >= 0) & (heads < NUM_HEADS)
    # Not masked by `keep`, which is enough of a mask for the angles: Triton 3.6 fails to compile that.
    positions = tl.load(positions_ptr + rows, mask=rows < num_rows, other=0)
    target = (slots // block_size) * block_stride + heads * head_stride + (slots % block_size) * slot_stride
    target_ptrs = cache_ptr + target[:, None]

    # A key's columns in three parts: the first and second elements of the rotated pairs, and the rest.
    pairs, others = tl.arange(0, PAIR_BLOCK), ROTARY + tl.arange(0, REST_BLOCK)
    HALF: tl.constexpr = ROTARY // 2
    first = pairs if IS_NEOX else 2 * pairs
    second = first + (HALF if IS_NEOX else 1)
    is_pair, is_other = pairs < HALF, others < HEAD_SIZE
    keep_pair, keep_other = keep[:, None] & is_pair[None, :], keep[:, None] & is_other[None, :]
    weights = weight_ptr + layer * HEAD_SIZE
    first_weight = tl.load(weights + first, mask=is_pair, other=0)
    second_weight = tl.load(weights + second, mask=is_pair, other=0)
    angles = cos_sin_ptr + positions[:, None] * cos_sin_stride + pairs[None, :]
    cos = tl.load(angles, mask=keep_pair, other=0).to(tl.float32)
    sin = tl.load(angles + HALF, mask=keep_pair, other=0).to(tl.float32)

    source = kv_ptr + (rows * kv_stride + (layer * NUM_HEADS + heads) * HEAD_SIZE)[:, None]
    x = tl.load(source + first[None, :], mask=keep_pair, other=0).to(tl.float32)
    y = tl.load(source + second[None, :], mask=keep_pair, other=0).to(tl.float32)
    columns = tl.arange(0, HEAD_BLOCK)
    keep_value = keep[:, None] & (columns < HEAD_SIZE)[None, :]
    values_at = tl.num_programs(1) * NUM_HEADS * HEAD_SIZE
    value = tl.load(source + values_at + columns[None, :], mask=keep_value, other=0)

    squares = tl.sum(x * x, 1) + tl.sum(y * y, 1)
    if ROTARY < HEAD_SIZE:
        z = tl.load(source + others[None, :], mask=keep_other, other=0).to(tl.float32)
        squares += tl.sum(z * z, 1)
    rstd = tl.rsqrt(squares / HEAD_SIZE + eps)
    x, y = _normed(x, rstd, first_weight), _normed(y, rstd, second_weight)
    dtype = kv_ptr.dtype.element_ty
    _store(target_ptrs + first[None, :], (x * cos - y * sin).to(dtype), k_scale, keep_pair, FP8_MAX)
    _store(target_ptrs + second[None, :], (y * cos + x * sin).to(dtype), k_scale, keep_pair, FP8_MAX)
    if ROTARY < HEAD_SIZE:
        z = _normed(z, rstd, tl.load(weights + others, mask=is_other, other=0))
        _store(target_ptrs + others[None, :], z.to(dtype), k_scale, keep_other, FP8_MAX)
    _store(target_ptrs + HEAD_SIZE + columns[None, :], value, v_scale, keep_value, FP8_MAX)


def reference_context_kv(
    kv: torch.Tensor,  # [T, 2*L*heads*D]
    k_norm_weight: torch.Tensor,  # [L, D]
    eps: float,
    cos_sin_cache: torch.Tensor,  # [positions, rotary size]
    is_neox_style: bool,
    positions: torch.Tensor,  # [>=T]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys, normed and rotated, and values of every layer, each [T, L, heads, D], in plain torch and kv's dtype."""
    num_rows, (num_layers, head_size) = kv.shape[0], k_norm_weight.shape
    raw, v = kv.reshape(num_rows, 2, num_layers, -1, head_size).unbind(1)
    wide = raw.to(torch.promote_types(kv.dtype, torch.float32))
    wide = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    k = wide.to(kv.dtype) * k_norm_weight[:, None, :]

    rotary = cos_sin_cache.shape[1]
    turned, rest = k[..., :rotary].to(wide.dtype), k[..., rotary:]
    cos, sin = cos_sin_cache[positions[:num_rows]].to(wide.dtype)[:, None, None, :].chunk(2, dim=-1)
    x, y = turned.chunk(2, dim=-1) if is_neox_style else (turned[..., 0::2], turned[..., 1::2])
    pairs = (x * cos - y * sin, y * cos + x * sin)
    turned = torch.cat(pairs, -1) if is_neox_style else torch.stack(pairs, -1).flatten(-2)
    return torch.cat((turned.to(kv.dtype), rest), -1), v


def reference_inject_context_kv(
    kv: torch.Tensor,  # [T, 2*L*heads*D]
    k_norm_weight: torch.Tensor,  # [L, D]
    eps: float,
    cos_sin_cache: torch.Tensor,  # [positions, rotary size]
    is_neox_style: bool,
    positions: torch.Tensor,  # [>=T]
    slot_mappings: torch.Tensor,  # [G, >=T]
    caches: LayerCaches,
) -> None:
    """The same as `inject_context_kv`, row by row in plain torch."""
    k, v = reference_context_kv(kv, k_norm_weight, eps, cos_sin_cache, is_neox_style, positions)
    for layer, (cache, group) in enumerate(zip(caches.tensors, caches.groups, strict=True)):
        for row, slot in enumerate(slot_mappings[group, : kv.shape[0]].tolist()):
            if slot >= 0:
                block, offset = divmod(slot, cache.shape[2])
                key, value = k[row, layer], v[row, layer]
                if caches.is_fp8:
                    key = (key.float() / caches.k_scales[layer]).clamp(-_FP8_MAX, _FP8_MAX)
                    value = (value.float() / caches.v_scales[layer]).clamp(-_FP8_MAX, _FP8_MAX)
                cache[block, :, offset] = torch.cat((key, value), -1).to(cache.dtype)
