# SPDX-License-Identifier: Apache-2.0
"""The training mask against the paper's rule, said once more in plain loops."""

import torch

from vllm_dflash.training.masks import block_mask


def may_attend(row: int, key: int, anchors: list[int], context: int, block: int) -> bool:
    if key < context:
        return key < anchors[row // block]
    return (key - context) // block == row // block


def test_literal_mask_of_two_small_blocks():
    mask = block_mask(torch.tensor([[1, 3]]), context_length=4, block_size=2)
    expected = [
        # context  | block 0 | block 1
        [1, 0, 0, 0, 1, 1, 0, 0],
        [1, 0, 0, 0, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 1],
        [1, 1, 1, 0, 0, 0, 1, 1],
    ]
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == [[expected]]


def test_every_row_and_key_follows_the_rule():
    generator = torch.Generator().manual_seed(0)
    for context, blocks, block in ((7, 3, 4), (12, 5, 2), (5, 1, 16)):
        anchors = torch.randint(0, context, (2, blocks), generator=generator)  # repeated anchors happen too
        mask = block_mask(anchors, context, block)
        assert mask.shape == (2, 1, blocks * block, context + blocks * block)
        for b in range(2):
            for row in range(blocks * block):
                for key in range(context + blocks * block):
                    expected = may_attend(row, key, anchors[b].tolist(), context, block)
                    assert mask[b, 0, row, key].item() is expected, (b, row, key)


def test_no_row_is_blind():
    """An anchor at 0 has no context, but its own block keeps the softmax finite."""
    assert block_mask(torch.zeros(1, 2, dtype=torch.long), 3, 4).any(dim=-1).all()
