# SPDX-License-Identifier: Apache-2.0
"""Blocks of a batch: what the drafter is given, and which of its rows are judged by which tokens."""

import torch
from tiny_training import MASK_ID, counting_responses, tiny_target

from vllm_dflash.training.blocks import BlockShape, draft_blocks
from vllm_dflash.training.data import collate


def test_rows_1_to_k_are_judged_and_the_anchor_row_is_not():
    """A drafter whose hidden state names its own row: what is judged must be rows 1..3 of each block of 4."""
    target, seen = tiny_target(), {}

    def draft(position_ids, noise_embedding, target_hidden, attention_mask):
        seen.update(position_ids=position_ids, noise=noise_embedding, context=target_hidden, mask=attention_mask)
        return (torch.arange(noise_embedding.shape[1]) % 4).float()[None, :, None].expand(8, -1, 32)

    batch, shape = collate(counting_responses(8), 40), BlockShape(4, MASK_ID, 512, tokens_per_anchor=5)
    anchors, valid = shape.choose_anchors(batch, torch.Generator().manual_seed(0))
    drafted = draft_blocks(draft, target, batch, torch.zeros(8, 40, 64), anchors, valid, shape)
    blocks = 40 // 5
    assert torch.equal(drafted.hidden, torch.tensor([1.0, 2.0, 3.0])[:, None].expand(8, blocks, 3, 32))
    # Counting responses: the token at position p of sequence b is 4 + (b + p) % 28, so labels follow from positions.
    positions = seen["position_ids"][:, 40:].view(8, blocks, 4)
    counted = 4 + (torch.arange(8)[:, None, None] + positions[..., 1:]) % 28
    known = positions[..., 1:] < 40
    assert torch.equal(drafted.labels, torch.where(known, counted, -100))
    assert torch.equal(seen["position_ids"][:, :40], torch.arange(40).expand(8, -1))
    assert seen["mask"].shape == (8, 1, 4 * blocks, 40 + 4 * blocks)
    mask_embedding = target.model.embed_tokens.weight[MASK_ID]
    assert torch.equal(seen["noise"].view(8, blocks, 4, -1)[:, :, 1:], mask_embedding.expand(8, blocks, 3, -1))


def test_blocks_of_a_sequence():
    batch, generator = collate(counting_responses(2), 40), torch.Generator().manual_seed(0)
    for most, tokens, count in ((512, 5, 8), (3, 5, 3), (512, 100, 1)):
        anchors, valid = BlockShape(4, MASK_ID, most, tokens).choose_anchors(batch, generator)
        assert anchors.shape == valid.shape == (2, count)
