# SPDX-License-Identifier: Apache-2.0
"""Who may attend to whom when many blocks of one sequence train in one forward (paper, sections 4.2 and A.1).

The rule, for a row of the block whose anchor is at position n:
 1. it sees the context features of positions 0 .. n-1. Not that of n: when the block is drafted, the target has
    emitted the anchor but not read it, so there is no feature of it yet;
 2. it sees every row of its own block, before and after it;
 3. it sees no row of any other block. Each block lives as if it were alone.
Keys stand in the order of the draft model's forward: first the context, then the blocks one after another.
"""

from __future__ import annotations

import torch
from torch import Tensor


def block_mask(
    anchors: Tensor,  # [B, N]
    context_length: int,
    block_size: int,
) -> Tensor:
    """The rule as a dense mask, bool [B, 1, N*Q, T + N*Q], True = may attend; T = `context_length`.

    Padding needs no rule of its own: it lies behind the last anchor. Costs B * N*Q * (T + N*Q) bytes.
    """
    batch, blocks = anchors.shape
    row_anchors = anchors.repeat_interleave(block_size, dim=1)  # [B, N*Q]
    positions = torch.arange(context_length, device=anchors.device)
    sees_context = positions < row_anchors[..., None]  # [B, N*Q, T]
    block_of_row = torch.arange(blocks, device=anchors.device).repeat_interleave(block_size)  # [N*Q]
    same_block = block_of_row[:, None] == block_of_row  # [N*Q, N*Q]
    return torch.cat((sees_context, same_block.expand(batch, -1, -1)), dim=2).unsqueeze(1)
