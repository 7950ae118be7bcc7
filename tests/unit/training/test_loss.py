# SPDX-License-Identifier: Apache-2.0
"""The drafter's loss against numbers worked out by hand."""

import math

import pytest
import torch

from vllm_dflash.training.loss import block_accuracy, block_loss, position_weights

IGNORED = -100


def test_weights_decay_from_one():
    # exp(0), exp(-1/7), exp(-2/7)
    assert position_weights(3, gamma=7.0).tolist() == pytest.approx([1.0, 0.866878, 0.751477], abs=1e-6)


def test_weighted_mean_of_three_rows():
    """p(label) = 1/2, 1/4 and, in an ignored row, whatever: (1 * ln 2 + e^-1 * ln 4) / (1 + e^-1) with gamma 1."""
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)], [5.0, -5.0]])
    labels = torch.tensor([0, 0, IGNORED])
    # (0.693147 + 0.367879 * 1.386294) / 1.367879 = 0.879561
    assert block_loss(logits, labels, gamma=1.0).item() == pytest.approx(0.879561, abs=1e-5)


def test_no_label_gives_zero_not_nan():
    assert block_loss(torch.zeros(2, 3), torch.full((2,), IGNORED), gamma=7.0).item() == 0.0


def test_accuracy_counts_leading_runs():
    # Argmax 1 everywhere. Block 0: right, right, wrong -> run 2. Block 1: wrong, right, right -> run 0.
    # Block 2 has one label, right -> run 1. Block 3 has none and does not count.
    logits = torch.tensor([0.0, 1.0]).expand(4, 3, 2)
    labels = torch.tensor([[1, 1, 0], [0, 1, 1], [1, IGNORED, IGNORED], [IGNORED] * 3])
    accuracy = block_accuracy(logits, labels)
    assert accuracy.per_position == pytest.approx([2 / 3, 1.0, 0.5])
    assert accuracy.run == pytest.approx(1.0)
