# SPDX-License-Identifier: Apache-2.0
"""What a draft layer's rows may attend to: its own rule by position, beside a mask of either kind, and attention by it.

A dense mask serves drafting. Training on a GPU brings a `BlockMask`, with which attention holds no [Q, S] tensor.

Letters: B sequences, Q rows, S keys, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, and_masks, flex_attention

from vllm_dflash.config import LayerAttention
from vllm_dflash.hf.attention import grouped_attention


@functools.cache
def compiled_flex_attention() -> Callable[..., torch.Tensor]:
    """Made when it is first needed: torch's compiler takes a second to import."""
    return torch.compile(flex_attention)


def visible(
    layer: LayerAttention,
    query_positions: torch.Tensor,  # [B, Q]
    key_positions: torch.Tensor,  # [B, S]
) -> torch.Tensor:
    """Which keys a layer's block rows may see by position: bool [B, 1, Q, S]."""
    return allowed(layer, key_positions[:, None, None, :] - query_positions[:, None, :, None])


def allowed(
    layer: LayerAttention,
    ahead: torch.Tensor,  # any shape: a key's position minus a row's
) -> torch.Tensor:
    """Whether a layer lets the row see the key, bool of the same shape."""
    mask = torch.ones_like(ahead, dtype=torch.bool)
    if layer.causal:
        mask = mask & (ahead <= 0)
    if layer.sliding_window is not None:
        mask = mask & (ahead.abs() < layer.sliding_window)
    return mask


def combined(
    mask: torch.Tensor | BlockMask | None,  # bool [B, 1, Q, S]; None: all see all
    layer: LayerAttention,
    query_positions: torch.Tensor,  # [B, Q]
    key_positions: torch.Tensor,  # [B, S]
) -> torch.Tensor | BlockMask | None:
    """What both a mask and a layer's rule allow, of the mask's kind."""
    if not layer.causal and layer.sliding_window is None:
        return mask
    if isinstance(mask, BlockMask):
        return narrowed(mask, layer, query_positions, key_positions)
    seen = visible(layer, query_positions, key_positions)
    return seen if mask is None else seen & mask


def narrowed(
    mask: BlockMask,  # over Q rows and S keys
    layer: LayerAttention,
    query_positions: torch.Tensor,  # [B, Q]
    key_positions: torch.Tensor,  # [B, S]
) -> BlockMask:
    """What both `mask` and the layer's rule allow. Tiles out of the rule's reach are left out; nothing is [Q, S]."""

    def rule(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return allowed(layer, key_positions[b, k] - query_positions[b, q])

    first_row, last_row = (bound[:, :, None] for bound in tile_bounds(query_positions, mask.BLOCK_SIZE[0]))
    first_key, last_key = (bound[:, None, :] for bound in tile_bounds(key_positions, mask.BLOCK_SIZE[1]))
    # Rules allow a range of distances around 0, so the distance nearest to 0 decides whether a tile has any allowed.
    nearest = (first_key - last_row).clamp(min=0) + (last_key - first_row).clamp(max=0)  # [B, row tiles, key tiles]
    tiles = mask.to_dense().bool() & allowed(layer, nearest)[:, None]
    return BlockMask.from_kv_blocks(
        *tile_lists(tiles),
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=and_masks(mask.mask_mod, rule),
        seq_lengths=mask.seq_lengths,
    )


def tile_bounds(
    values: torch.Tensor,  # [B, S]
    size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest value of every `size` neighbours, each [B, ceil(S / size)]."""
    length = values.shape[1]
    inside = torch.arange(-(-length // size) * size, device=values.device).clamp(max=length - 1)
    tiles = values[:, inside].unflatten(1, (-1, size))
    return tiles.amin(dim=-1), tiles.amax(dim=-1)


def tile_lists(
    tiles: torch.Tensor,  # bool [B, 1, row tiles, key tiles]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Set key tiles as a `BlockMask` lists them: how many [B, 1, row tiles], and all, those first [.., key tiles]."""
    order = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(dim=-1, dtype=torch.int32), order.to(torch.int32)


def attention(
    query: torch.Tensor,  # [B, heads, Q, D]
    key: torch.Tensor,  # [B, K/V heads, S, D]
    value: torch.Tensor,  # [B, K/V heads, S, D]
    mask: torch.Tensor | BlockMask | None,  # bool [B, 1, Q, S]; None: all see all
) -> torch.Tensor:
    """Softmax attention [B, heads, Q, D], by the kernel that the kind of mask calls for."""
    if not isinstance(mask, BlockMask):
        return grouped_attention(query, key, value, mask)
    # The CPU has no compiled backward; its eager one is slow and serves tests.
    attend = compiled_flex_attention() if query.is_cuda else flex_attention
    # Under autocast the norms leave q and k in fp32 and v in bf16, which one kernel cannot take.
    return attend(query.to(value.dtype), key.to(value.dtype), value, block_mask=mask, enable_gqa=True)
