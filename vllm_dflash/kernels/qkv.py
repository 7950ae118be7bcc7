# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""From the QKV product to attention in one launch: head norms, rotation, and K and V straight into the paged cache.

One program per row and head. Norm in fp32, rounded before and after its weight as vLLM's is; rotation in fp32, rounded
once.

Letters: M rows, Hq query heads, Hkv key/value heads, D head size, P positions of the rotation's table.
"""

from __future__ import annotations

import torch
from vllm.triton_utils import tl, triton

#: The largest number of float8_e4m3fn: what is larger is stored as this.
_FP8_MAX = 448.0


def norm_rope_cache(
    qkv: torch.Tensor,  # [M, (Hq+2*Hkv)*D]
    q_weight: torch.Tensor | None,  # [D]; None: no norm
    k_weight: torch.Tensor | None,  # [D]; None: no norm
    eps: float,
    cos_sin_cache: torch.Tensor,  # [P, rot], rot <= D: rot/2 cosines, then rot/2 sines
    positions: torch.Tensor,  # [M] int64
    slot_mapping: torch.Tensor,  # [M] int64; a negative slot writes nothing
    kv_cache: torch.Tensor,  # [blocks, Hkv, block_size, 2*D], any strides; key, then value
    k_scale: torch.Tensor | None = None,  # scalar fp32; for an FP8 cache: stored = key / scale
    v_scale: torch.Tensor | None = None,  # scalar fp32
    *,
    is_neox_style: bool = True,  # pairs are (i, i + rot/2); otherwise (2i, 2i + 1)
    out: torch.Tensor | None = None,  # [M, Hq, D]
) -> torch.Tensor:
    """Normed and rotated queries [M, Hq, D]; normed and rotated keys, and values, go into `kv_cache`."""
    num_rows = qkv.shape[0]
    _, num_kv_heads, block_size, width = kv_cache.shape
    head_dim = width // 2
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    if out is None:
        out = torch.empty((num_rows, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if kv_cache.dtype == torch.uint8:  # how vLLM allocates an FP8 cache
        kv_cache = kv_cache.view(torch.float8_e4m3fn)
    _check(qkv, q_weight, k_weight, cos_sin_cache, positions, slot_mapping, kv_cache, k_scale, v_scale, out)
    if num_rows == 0:
        return out
    _norm_rope_cache_kernel[(num_rows, num_heads + 2 * num_kv_heads)](
        qkv,
        q_weight,
        k_weight,
        cos_sin_cache,
        positions,
        slot_mapping,
        kv_cache,
        k_scale,
        v_scale,
        out,
        qkv.stride(0),
        cos_sin_cache.stride(0),
        *kv_cache.stride(),
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=cos_sin_cache.shape[1],
        BLOCK_SIZE=block_size,
        HAS_Q_NORM=q_weight is not None,
        HAS_K_NORM=k_weight is not None,
        IS_NEOX=is_neox_style,
        FP8_MAX=_FP8_MAX if kv_cache.dtype == torch.float8_e4m3fn else 0.0,
        HAS_SCALES=k_scale is not None,
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=1,
    )
    return out


def _check(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    num_rows, num_heads, head_dim = out.shape
    num_kv_heads = kv_cache.shape[1]
    assert kv_cache.shape[3] == 2 * head_dim, f"cache {tuple(kv_cache.shape)}, heads of {head_dim}"
    assert qkv.shape == (num_rows, (num_heads + 2 * num_kv_heads) * head_dim), f"{tuple(qkv.shape)}"
    assert qkv.stride(1) == 1 and out.is_contiguous() and num_heads > 0
    for weight in (q_weight, k_weight):
        assert weight is None or (weight.shape == (head_dim,) and weight.is_contiguous()), "one norm weight a dimension"
    rotary_dim = cos_sin_cache.shape[1]
    assert rotary_dim % 2 == 0 and rotary_dim <= head_dim and cos_sin_cache.stride(1) == 1, f"{rotary_dim=}"
    for rows in (positions, slot_mapping):
        assert rows.shape == (num_rows,) and rows.dtype == torch.int64 and rows.is_contiguous(), f"{tuple(rows.shape)}"
    assert (k_scale is None) == (v_scale is None), "both scales or none"
    assert kv_cache.dtype in (qkv.dtype, torch.float8_e4m3fn), f"{qkv.dtype} rows, {kv_cache.dtype} cache"


@triton.jit
def _normed(
    x_ptr,  # [HEAD_DIM]
    weight_ptr,  # [HEAD_DIM]; read only if HAS_NORM
    dims,  # [BLOCK_D]
    mask,  # [BLOCK_D]
    inverse_rms,
    HAS_NORM: tl.constexpr,
):
    """Elements `dims` of a head, normed, as fp32 numbers of the rows' type."""
    x = tl.load(x_ptr + dims, mask=mask, other=0.0)
    if HAS_NORM:
        weight = tl.load(weight_ptr + dims, mask=mask, other=0.0).to(x.dtype)
        x = ((x.to(tl.float32) * inverse_rms).to(x.dtype).to(tl.float32) * weight.to(tl.float32)).to(x.dtype)
    return x.to(tl.float32)


@triton.jit
def _normed_and_rotated(
    x_ptr,  # [HEAD_DIM]
    weight_ptr,  # [HEAD_DIM]
    cos_sin_ptr,  # [ROTARY_DIM]
    dims,  # [BLOCK_D]
    eps,
    HAS_NORM: tl.constexpr,
    IS_NEOX: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
):
    """One head [BLOCK_D] fp32. Each element and its partner are loaded apart: no exchange between threads."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    if IS_NEOX:
        is_first = dims < HALF
        partners = tl.where(is_first, dims + HALF, dims - HALF)
        frequencies = tl.where(is_first, dims, dims - HALF)
    else:
        is_first = dims % 2 == 0
        partners = tl.where(is_first, dims + 1, dims - 1)
        frequencies = dims // 2
    rotated = dims < ROTARY_DIM
    inverse_rms = 1.0
    if HAS_NORM:
        x = tl.load(x_ptr + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(x * x, axis=0) / HEAD_DIM + eps)
    x = _normed(x_ptr, weight_ptr, dims, dims < HEAD_DIM, inverse_rms, HAS_NORM)
    partner = _normed(x_ptr, weight_ptr, partners, rotated, inverse_rms, HAS_NORM)
    cos = tl.load(cos_sin_ptr + frequencies, mask=rotated, other=1.0).to(tl.float32)
    sin = tl.load(cos_sin_ptr + HALF + frequencies, mask=rotated, other=0.0).to(tl.float32)
    return x * cos + tl.where(is_first, -partner, partner) * sin


@triton.jit
def _store_cached(
    cache_ptr,  # [HEAD_DIM]
    x,  # [BLOCK_D], of the rows' type
    scale_ptr,  # scalar; read only if HAS_SCALES
    dims,  # [BLOCK_D]
    dim_stride,
    mask,  # [BLOCK_D]
    FP8_MAX: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    if FP8_MAX > 0:
        x = x.to(tl.float32)
        if HAS_SCALES:
            x = x / tl.load(scale_ptr)
        x = tl.minimum(tl.maximum(x, -FP8_MAX), FP8_MAX)
    tl.store(cache_ptr + dims * dim_stride, x.to(cache_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_rope_cache_kernel(
    qkv_ptr,  # [M, (Hq+2*Hkv)*D]
    q_weight_ptr,  # [D]
    k_weight_ptr,  # [D]
    cos_sin_ptr,  # [P, rot]
    positions_ptr,  # [M]
    slots_ptr,  # [M]
    cache_ptr,  # [blocks, Hkv, BLOCK_SIZE, 2*D]
    k_scale_ptr,  # scalar
    v_scale_ptr,  # scalar
    out_ptr,  # [M, Hq, D]
    qkv_stride,
    cos_sin_stride,
    block_stride,
    head_stride,
    slot_stride,
    dim_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    IS_NEOX: tl.constexpr,
    FP8_MAX: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    mask = dims < HEAD_DIM
    x_ptr = qkv_ptr + row * qkv_stride + head * HEAD_DIM
    cos_sin_ptr += tl.load(positions_ptr + row) * cos_sin_stride
    if head < NUM_HEADS:
        q = _normed_and_rotated(x_ptr, q_weight_ptr, cos_sin_ptr, dims, eps, HAS_Q_NORM, IS_NEOX, HEAD_DIM, ROTARY_DIM)
        tl.store(out_ptr + (row * NUM_HEADS + head) * HEAD_DIM + dims, q.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        slot = tl.load(slots_ptr + row)
        if slot >= 0:
            cache_ptr += slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * slot_stride
            if head < NUM_HEADS + NUM_KV_HEADS:
                k = _normed_and_rotated(
                    x_ptr, k_weight_ptr, cos_sin_ptr, dims, eps, HAS_K_NORM, IS_NEOX, HEAD_DIM, ROTARY_DIM
                ).to(qkv_ptr.dtype.element_ty)
                cache_ptr += (head - NUM_HEADS) * head_stride
                _store_cached(cache_ptr, k, k_scale_ptr, dims, dim_stride, mask, FP8_MAX, HAS_SCALES)
            else:
                v = tl.load(x_ptr + dims, mask=mask, other=0.0)
                cache_ptr += (head - NUM_HEADS - NUM_KV_HEADS) * head_stride + HEAD_DIM * dim_stride
                _store_cached(cache_ptr, v, v_scale_ptr, dims, dim_stride, mask, FP8_MAX, HAS_SCALES)


def reference_norm_rope_cache(
    qkv: torch.Tensor,  # [M, (Hq+2*Hkv)*D]
    q_weight: torch.Tensor | None,  # [D]
    k_weight: torch.Tensor | None,  # [D]
    eps: float,
    cos_sin_cache: torch.Tensor,  # [P, rot]
    positions: torch.Tensor,  # [M]
    slot_mapping: torch.Tensor,  # [M]
    kv_cache: torch.Tensor,  # [blocks, Hkv, block_size, 2*D]
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    *,
    is_neox_style: bool = True,
) -> torch.Tensor:
    """The same as `norm_rope_cache`: whole tensors for the arithmetic, row by row into the cache."""
    num_kv_heads, block_size, head_dim = kv_cache.shape[1], kv_cache.shape[2], kv_cache.shape[3] // 2
    heads = qkv.unflatten(1, (-1, head_dim))
    q, k, v = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)

    def normed_and_rotated(
        x: torch.Tensor,  # [M, heads, D]
        weight: torch.Tensor | None,  # [D]
    ) -> torch.Tensor:
        if weight is not None:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            x = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight.to(x.dtype)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rotary_dim = cos_sin_cache.shape[1]
        cos, sin = cos_sin_cache[positions].to(wide.dtype)[:, None].chunk(2, dim=-1)
        turned, rest = wide[..., :rotary_dim], wide[..., rotary_dim:]
        if is_neox_style:
            first, second = turned.chunk(2, dim=-1)
        else:
            first, second = turned[..., ::2], turned[..., 1::2]
        pair = (first * cos - second * sin, second * cos + first * sin)
        turned = torch.cat(pair, dim=-1) if is_neox_style else torch.stack(pair, dim=-1).flatten(-2)
        return torch.cat((turned, rest), dim=-1).to(x.dtype)

    q, k = normed_and_rotated(q, q_weight), normed_and_rotated(k, k_weight)
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        for values, scale, first_dim in ((k[row], k_scale, 0), (v[row], v_scale, head_dim)):
            if kv_cache.dtype == torch.float8_e4m3fn:
                values = (values.float() / (1.0 if scale is None else scale)).clamp(-_FP8_MAX, _FP8_MAX)
            entry = kv_cache[slot // block_size, :, slot % block_size, first_dim : first_dim + head_dim]
            entry.copy_(values.to(kv_cache.dtype))
    return q
