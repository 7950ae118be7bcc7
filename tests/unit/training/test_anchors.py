# SPDX-License-Identifier: Apache-2.0
"""Anchors stay inside responses, and block rows hold what drafting will see."""

import torch

from vllm_dflash.training.anchors import IGNORED, block_labels, block_positions, block_token_ids, choose_anchors


def draw(prompt_lengths, lengths, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return choose_anchors(torch.tensor(prompt_lengths), torch.tensor(lengths), count, generator)


def test_anchors_lie_between_first_response_token_and_last_but_one():
    anchors, valid = draw([3, 10], [9, 60], count=200)
    # Response positions 3..8: anchors 3..7. Positions 10..59: anchors 10..58. All of them, once each.
    assert sorted(anchors[0][valid[0]].tolist()) == [3, 4, 5, 6, 7]
    assert sorted(anchors[1][valid[1]].tolist()) == list(range(10, 59))


def test_anchors_rise_and_invalid_ones_are_last():
    anchors, valid = draw([5, 3], [500, 6], count=8)
    assert anchors[0].tolist() == sorted(anchors[0].tolist()) and valid[0].all()
    assert anchors[1].tolist() == [3, 4] + [0] * 6
    assert valid[1].tolist() == [True] * 2 + [False] * 6


def test_few_anchors_are_distinct_and_resampled():
    first, valid = draw([5], [500], count=8, seed=1)
    second, _ = draw([5], [500], count=8, seed=2)
    assert valid.all()
    assert len(set(first[0].tolist())) == 8
    assert set(first[0].tolist()) != set(second[0].tolist())
    assert torch.equal(first, draw([5], [500], count=8, seed=1)[0])


def test_response_of_one_token_has_no_anchor():
    anchors, valid = draw([4], [5], count=3)
    assert not valid.any()
    assert anchors.tolist() == [[0, 0, 0]]


def test_rows_of_a_block():
    token_ids = torch.tensor([[10, 11, 12, 13, 14, 15]])
    anchors = torch.tensor([[2, 4]])
    assert block_positions(anchors, 4).tolist() == [[2, 3, 4, 5, 4, 5, 6, 7]]
    assert block_token_ids(token_ids, anchors, 4, mask_token_id=99).tolist() == [[12, 99, 99, 99, 14, 99, 99, 99]]


def test_labels_end_with_the_sequence_not_with_the_padding():
    token_ids = torch.tensor([[10, 11, 12, 13, 14, 0, 0]])  # two tokens of padding
    anchors = torch.tensor([[1, 3, 0]])
    valid = torch.tensor([[True, True, False]])
    labels = block_labels(token_ids, torch.tensor([5]), anchors, valid, block_size=4)
    assert labels.tolist() == [[[12, 13, 14], [14, IGNORED, IGNORED], [IGNORED] * 3]]
