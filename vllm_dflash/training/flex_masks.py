# SPDX-License-Identifier: Apache-2.0
"""The rule of `masks` for flex attention (arXiv 2412.05496), which stores no [rows, keys] tensor and skips empty tiles.

With 512 blocks of 16 rows over 3072 positions, a dense mask takes 92 MB a sequence, and attention would read all of it
in every layer though less than a third is true.

Letters: B sequences, N blocks a sequence, Q rows a block, T context length.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from vllm_dflash.config import LayerAttention
from vllm_dflash.hf.masks import combined, tile_bounds, tile_lists
from vllm_dflash.training.anchors import block_positions
from vllm_dflash.training.masks import block_mask

TILE = 128  # rows and keys of a tile; flex attention's kernels are tuned for this


def attention_mask_for(
    device: torch.device | str,
    anchors: Tensor,  # [B, N]
    context_length: int,
    block_size: int,
    *,
    sliding: LayerAttention | None = None,
) -> Tensor | BlockMask:
    """The training mask as the draft model should get it on a device: for flex attention on CUDA, else dense.

    `sliding` as in `flex_block_mask`. Drafting on a CPU needs the dense mask for its gradients.
    """
    anchors = anchors.to(device)
    if anchors.is_cuda:
        return flex_block_mask(anchors, context_length, block_size, sliding=sliding)
    return _within(sliding, block_mask(anchors, context_length, block_size), anchors, context_length, block_size)


def flex_block_mask(
    anchors: Tensor,  # [B, N]
    context_length: int,
    block_size: int,
    *,
    sliding: LayerAttention | None = None,
) -> BlockMask:
    """The rule of `masks.block_mask` over N*Q rows and T + N*Q keys, T = `context_length`, on the anchors' device.

    sliding: a layer's own rule on top, for use outside the draft model: its layers add theirs by themselves.
    """
    context_ends = anchors.clamp(max=context_length).repeat_interleave(block_size, dim=1)  # [B, N*Q]
    row_blocks = torch.arange(anchors.shape[1], device=anchors.device).repeat_interleave(block_size)  # [N*Q]
    key_blocks = torch.cat((row_blocks.new_full((context_length,), -1), row_blocks))  # [T + N*Q], -1: context

    # Tables instead of arithmetic with the lengths: numbers in it would have a kernel compiled for each of them.
    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k < context_ends[b, q]) | (key_blocks[k] == row_blocks[q])

    whole = _whole_tiles(context_ends, len(key_blocks))
    partial = (_context_tiles(context_ends, len(key_blocks)) | _own_tiles(row_blocks, key_blocks)) & ~whole
    mask = BlockMask.from_kv_blocks(
        *tile_lists(partial.unsqueeze(1)),
        *tile_lists(whole.unsqueeze(1)),
        BLOCK_SIZE=TILE,
        mask_mod=rule,
        seq_lengths=(len(row_blocks), len(key_blocks)),
    )
    return _within(sliding, mask, anchors, context_length, block_size)


def _first_keys(num_keys: int, device: torch.device) -> Tensor:
    """First key of every tile, [key tiles]."""
    return torch.arange(0, num_keys, TILE, device=device)


def _context_tiles(
    context_ends: Tensor,  # [B, rows]
    num_keys: int,
) -> Tensor:
    """Tiles in which some row sees some context, bool [B, row tiles, key tiles]."""
    _, furthest = tile_bounds(context_ends, TILE)
    return _first_keys(num_keys, context_ends.device) < furthest[..., None]


def _whole_tiles(
    context_ends: Tensor,  # [B, rows]
    num_keys: int,
) -> Tensor:
    """Tiles in which all of `TILE` rows see all of `TILE` keys, bool [B, row tiles, key tiles]: no rule is asked."""
    nearest, _ = tile_bounds(context_ends, TILE)
    all_seen = _first_keys(num_keys, context_ends.device) + TILE <= nearest[..., None]
    row_ends = torch.arange(1, nearest.shape[1] + 1, device=context_ends.device) * TILE
    return all_seen & (row_ends <= context_ends.shape[1])[:, None]


def _own_tiles(
    row_blocks: Tensor,  # [rows]
    key_blocks: Tensor,  # [keys], -1: context
) -> Tensor:
    """Tiles in which some row meets its own block, bool [row tiles, key tiles]: their ranges of blocks overlap."""
    first_row, last_row = (bound[0, :, None] for bound in tile_bounds(row_blocks[None], TILE))
    first_key, last_key = (bound[0] for bound in tile_bounds(key_blocks[None], TILE))
    return (first_row <= last_key) & (first_key <= last_row)


def _within(
    layer: LayerAttention | None,
    mask: Tensor | BlockMask,  # bool [B, 1, N*Q, T + N*Q]
    anchors: Tensor,  # [B, N]
    context_length: int,
    block_size: int,
) -> Tensor | BlockMask:
    """The mask with a layer's rule on top: context stands at 0 .. T-1, blocks stand from their anchors on."""
    if layer is None:
        return mask
    rows = block_positions(anchors, block_size)
    context = torch.arange(context_length, device=anchors.device).expand(len(anchors), -1)
    return combined(mask, layer, rows, torch.cat((context, rows), dim=1))
