# SPDX-License-Identifier: Apache-2.0
"""The drafter's loss and its training-time measures (paper, section 4.2: w_k = exp(-(k-1)/gamma)).

An early mistake throws the rest of the block away, so early rows weigh more. Letters: K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vllm_dflash.training.anchors import IGNORED


def position_weights(num_drafted: int, gamma: float) -> Tensor:
    """w_k = exp(-(k-1)/gamma) for k = 1..K, [K]. The paper pairs gamma 7 with block 16, 5 with 10, 4 with 8."""
    return torch.exp(-torch.arange(num_drafted) / gamma)


def block_loss(
    logits: Tensor,  # [..., K, V]
    labels: Tensor,  # [..., K], IGNORED where there is nothing to predict
    gamma: float,
) -> Tensor:
    """Weighted mean cross-entropy in nats over the rows that have a label; 0 when none has."""
    weights = position_weights(labels.shape[-1], gamma).to(labels.device) * (labels != IGNORED)  # [..., K]
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return (losses * weights.flatten()).sum() / weights.sum().clamp(min=1e-9)


@dataclass(frozen=True)
class BlockAccuracy:
    """How good argmax drafts are. per_position: share of right tokens at k = 1..K. run: mean leading right tokens.

    `1 + run` estimates the acceptance length over random anchors; decoding restarts where blocks end, so the measured
    one differs a little.
    """

    per_position: tuple[float, ...]
    run: float


def block_accuracy(
    logits: Tensor,  # [..., K, V]
    labels: Tensor,  # [..., K]
) -> BlockAccuracy:
    """Accuracy over the rows that have a label; blocks without any label are left out of `run`."""
    known = (labels != IGNORED).flatten(0, -2)  # [M, K]
    right = (logits.argmax(dim=-1) == labels).flatten(0, -2) & known
    per_position = right.sum(0) / known.sum(0).clamp(min=1)
    runs = right.long().cumprod(dim=1).sum(dim=1)[known[:, 0]]
    return BlockAccuracy(tuple(per_position.tolist()), runs.float().mean().item() if len(runs) else 0.0)
