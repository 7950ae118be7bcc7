# SPDX-License-Identifier: Apache-2.0
"""What a drafter is trained to minimise: cross-entropy, on request mixed with a divergence from the target.

Both are weighted by position in the block, since a wrong token throws the rest of its block away. Two weightings:
"decay" falls with the position alone (DFlash paper, arXiv 2602.06036, section 4.2); "d-pace" follows how far the
drafter gets at present (D-PACE, arXiv 2605.18810, equations 7 to 9).

Letters: B sequences, S sequence length, N blocks a sequence, K drafted tokens a block, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vllm_dflash.training.anchors import IGNORED

KINDS = ("decay", "d-pace")


@dataclass(frozen=True)
class Objective:
    """Which loss to train with.

    kind: how rows are weighted, "decay" or "d-pace".
    gamma: of "decay", in positions: how many make the weight fall to 1/e.
    alpha: of "d-pace", in (0, 1]: the confidence that even a hopeless row is credited with. Its paper uses 0.5.
    kl_weight: share of KL(target || draft) in the loss, 0 to 1; cross-entropy has the rest.
    kl_temperature: what both logits are divided by in the KL. The KL is not scaled back by its square.

    Raises ValueError naming a field that cannot be, and its value.
    """

    kind: str
    gamma: float = 7.0
    alpha: float = 0.5
    kl_weight: float = 0.0
    kl_temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind = {self.kind!r}: must be one of {', '.join(KINDS)}")
        if not self.gamma > 0:
            raise ValueError(f"gamma = {self.gamma}: must be above 0")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha = {self.alpha}: must be above 0 and at most 1")
        if not 0 <= self.kl_weight <= 1:
            raise ValueError(f"kl_weight = {self.kl_weight}: must be from 0 to 1")
        if not self.kl_temperature > 0:
            raise ValueError(f"kl_temperature = {self.kl_temperature}: must be above 0")


def objective_loss(
    logits: Tensor,  # [..., K, V]
    labels: Tensor,  # [..., K], IGNORED where there is nothing to predict
    objective: Objective,
    target_logits: Tensor | None = None,  # [..., K, V]: the target's for the same tokens, as `target_rows` gives them
) -> Tensor:
    """The loss of many blocks, a scalar in fp32. Rows without a label count for nothing; 0 when no row has one.

    "decay" is a weighted mean over rows, in nats. "d-pace" is a mean over the blocks that have a label, of sums over
    their rows: its weights add up to something that grows with the drafter, so the loss may rise while drafts improve.

    Raises ValueError when the objective has a KL and the target's logits are missing or of another shape.
    """
    total, divisor = objective_sums(logits, labels, objective, target_logits)
    return total / divisor.clamp(min=1e-9)


def objective_sums(
    logits: Tensor,  # [..., K, V]
    labels: Tensor,  # [..., K]
    objective: Objective,
    target_logits: Tensor | None = None,  # [..., K, V]
) -> tuple[Tensor, Tensor]:
    """`objective_loss` as a sum over rows and what to divide it by, scalars in fp32; both add up over chunks of blocks.

    Raises ValueError as `objective_loss` does.
    """
    known = labels != IGNORED  # [..., K]
    entropies = cross_entropies(logits, labels)  # [..., K]
    if objective.kind == "decay":
        weights = position_weights(labels.shape[-1], objective.gamma).to(labels.device) * known
        divisor = weights.sum()
    else:
        weights = confidence_weights(torch.exp(-entropies), known, objective.alpha)
        divisor = known.any(dim=-1).sum().float()
    losses = entropies
    if objective.kl_weight > 0:
        divergences = kl_divergences(logits, _checked(target_logits, logits), objective.kl_temperature)
        losses = (1 - objective.kl_weight) * entropies + objective.kl_weight * divergences
    return (losses * weights).sum(), divisor


def position_weights(num_drafted: int, gamma: float) -> Tensor:
    """w_k = exp(-(k-1)/gamma) for k = 1..K, [K]. The paper pairs gamma 7 with block 16, 5 with 10, 4 with 8."""
    return torch.exp(-torch.arange(num_drafted) / gamma)


def cross_entropies(
    logits: Tensor,  # [..., K, V]
    labels: Tensor,  # [..., K]
) -> Tensor:
    """-ln q(label) of every row in nats, fp32 [..., K]; 0 where there is no label."""
    rows = nn.functional.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return rows.view_as(labels)


def kl_divergences(
    logits: Tensor,  # [..., K, V]
    target_logits: Tensor,  # [..., K, V], finite
    temperature: float,
) -> Tensor:
    """KL(target || draft) of every row in nats, fp32 [..., K]. No gradient reaches the target."""
    draft = nn.functional.log_softmax(logits.float() / temperature, dim=-1)
    target = nn.functional.log_softmax(target_logits.detach().float() / temperature, dim=-1)
    return nn.functional.kl_div(draft, target, reduction="none", log_target=True).sum(dim=-1)


@torch.no_grad()
def confidence_weights(
    confidences: Tensor,  # [..., K]: the drafter's probability of each label
    known: Tensor,  # bool [..., K]: rows that have a label
    alpha: float,
) -> Tensor:
    """D-PACE's weights [..., K], 0 where there is no label.

    With c_i = alpha + (1 - alpha) q_i (equation 7), a block is right up to row m with about C_m = c_1 ... c_m, and
    C_1 + ... + C_K estimates how many tokens are accepted. Row k has a part in the terms from m = k on, hence
    w_k = C_k + ... + C_K (equation 8), held constant (equation 9). Rows without a label are left out of products and
    sums. The floor alpha keeps rows behind a bad one from losing all weight.

    The weights are those of all implementations read: its author's (github.com/Lucas-TY/D-PACE), SpecForge,
    speculators and NVIDIA Model-Optimizer. They differ in what they divide by: sequences in the first two, labelled
    rows in speculators, the sum of weights in Model-Optimizer. That sum would take out what the weights say about
    accepted length, and a count of sequences makes the loss depend on the number of anchors, so `objective_loss`
    divides by the number of blocks that have a label, which D-PACE's author recommends too.
    """
    credited = torch.where(known, alpha + (1 - alpha) * confidences, 1.0)
    reached = credited.cumprod(dim=-1) * known  # C_m
    return reached.flip(-1).cumsum(dim=-1).flip(-1) * known


def target_rows(
    rows: Tensor,  # [B, S, X]: the target's hidden states or logits
    anchors: Tensor,  # [B, N]
    block_size: int,
) -> Tensor:
    """What the target says about the tokens a block predicts, [B, N, K, X], with K = block_size - 1.

    Row k predicts token n+k of a block at anchor n, and the target does so at position n+k-1. Positions past the end
    repeat the last one: their rows have no label.
    """
    positions = anchors[..., None] + torch.arange(block_size - 1, device=anchors.device)  # [B, N, K]
    sequences = torch.arange(len(rows), device=rows.device)[:, None, None]
    return rows[sequences, positions.clamp(max=rows.shape[1] - 1)]


def _checked(
    target_logits: Tensor | None,  # [..., K, V]
    logits: Tensor,  # [..., K, V]
) -> Tensor:
    """The target's logits; a shape that merely broadcasts is a mistake too."""
    if target_logits is None:
        raise ValueError("kl_weight is above 0, and target_logits is missing")
    if target_logits.shape != logits.shape:
        raise ValueError(f"target_logits {list(target_logits.shape)} is not of logits' shape {list(logits.shape)}")
    return target_logits
