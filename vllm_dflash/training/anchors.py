# SPDX-License-Identifier: Apache-2.0
"""Where training blocks start, and what stands in their rows (paper, sections 4.2 and A.1). Pure tensor functions.

A block is what drafting sees after a verification: the anchor, a token the target has just emitted but not yet read,
and masks after it. Random anchors, drawn anew each epoch, cover the starts that decoding will really meet.

Letters: B sequences, S sequence length, N blocks a sequence, Q rows a block, K = Q - 1 drafted tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100  # label of a row that has nothing to predict


def choose_anchors(
    prompt_lengths: Tensor,  # [B]
    lengths: Tensor,  # [B]: prompt and response together
    count: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draw up to `count` distinct anchor positions a sequence: (anchors [B, count], valid bool [B, count]).

    The first possible anchor is the first response token, position `prompt_length`; the last is the last token but
    one, since a block must have at least one token to predict. Where a sequence has fewer, the rest is invalid (at 0).
    Anchors rise, so that neighbouring rows see about the same context: attention in tiles skips most of what they do
    not see.
    """
    positions = torch.arange(max(int(lengths.max()), count), device=lengths.device)  # [S]
    allowed = (positions >= prompt_lengths[:, None]) & (positions <= lengths[:, None] - 2)  # [B, S]
    scores = torch.rand(allowed.shape, generator=generator, device=generator.device).to(allowed.device)
    scores = scores.masked_fill(~allowed, -1.0)
    best, drawn = scores.topk(count, dim=1)
    invalid_last = drawn.masked_fill(best < 0, scores.shape[1])
    anchors = invalid_last.sort(dim=1).values
    valid = anchors < scores.shape[1]
    return anchors.masked_fill(~valid, 0), valid


def block_positions(
    anchors: Tensor,  # [B, N]
    block_size: int,
) -> Tensor:
    """Positions of all block rows [B, N*Q]: a block at anchor n stands at n .. n+K."""
    return (anchors[..., None] + torch.arange(block_size, device=anchors.device)).flatten(1)


def block_token_ids(
    token_ids: Tensor,  # [B, S]
    anchors: Tensor,  # [B, N]
    block_size: int,
    mask_token_id: int,
) -> Tensor:
    """Tokens of all block rows [B, N*Q]: the anchor's own token, then K masks."""
    blocks = token_ids.new_full((*anchors.shape, block_size), mask_token_id)
    blocks[..., 0] = token_ids.gather(1, anchors)
    return blocks.flatten(1)


def block_labels(
    token_ids: Tensor,  # [B, S]
    lengths: Tensor,  # [B]
    anchors: Tensor,  # [B, N]
    valid: Tensor,  # bool [B, N]
    block_size: int,
) -> Tensor:
    """What rows 1..K are to predict [B, N, K]: tokens n+1 .. n+K; IGNORED past the end and in invalid blocks."""
    positions = anchors[..., None] + torch.arange(1, block_size, device=anchors.device)  # [B, N, K]
    known = (positions < lengths[:, None, None]) & valid[..., None]
    inside = positions.clamp(max=token_ids.shape[1] - 1)
    return token_ids.gather(1, inside.flatten(1)).view_as(positions).masked_fill(~known, IGNORED)
