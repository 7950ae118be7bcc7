# SPDX-License-Identifier: Apache-2.0
"""The drafter's objectives against numbers worked out by hand, and against plain loops."""

import math

import pytest
import torch

from vllm_dflash.training.objective import (
    Objective,
    confidence_weights,
    kl_divergences,
    objective_loss,
    objective_sums,
    position_weights,
    target_rows,
)

IGNORED = -100
D_PACE = Objective("d-pace")


def random_blocks(blocks: int = 6, rows: int = 5, vocabulary: int = 7, seed: int = 0):
    """Logits, target logits, and labels of which the last of some blocks, and all of one, are missing."""
    generator = torch.Generator().manual_seed(seed)
    logits, target = torch.randn(2, blocks, rows, vocabulary, generator=generator).mul(2)
    labels = torch.randint(vocabulary, (blocks, rows), generator=generator)
    labels[0, 3:] = labels[1, 1:] = labels[2] = IGNORED
    return logits.requires_grad_(), target, labels


def stated(logits, labels, objective, target=None):
    """The objective, once more and in loops: (sum, divisor)."""
    total = divisor = 0.0
    for block, names in enumerate(labels.tolist()):
        known = [k for k, name in enumerate(names) if name != IGNORED]
        q = [logits[block, k].double().softmax(-1) for k in range(len(names))]
        losses, weights = {}, {}
        for k in known:
            losses[k] = -(1 - objective.kl_weight) * math.log(q[k][names[k]])
            if objective.kl_weight:
                p = target[block, k].double().softmax(-1)
                losses[k] += objective.kl_weight * sum(a * math.log(a / b) for a, b in zip(p, q[k], strict=True)).item()
        for k in known:
            if objective.kind == "decay":
                weights[k] = math.exp(-k / objective.gamma)
            else:
                right_to = {
                    m: math.prod(
                        objective.alpha + (1 - objective.alpha) * q[i][names[i]].item() for i in known if i <= m
                    )
                    for m in known
                }
                weights[k] = sum(right_to[m] for m in known if m >= k)
        total += sum(losses[k] * weights[k] for k in known)
        divisor += sum(weights.values()) if objective.kind == "decay" else bool(known)
    return total, divisor


def test_weights_decay_from_one():
    # exp(0), exp(-1/7), exp(-2/7)
    assert position_weights(3, gamma=7.0).tolist() == pytest.approx([1.0, 0.866878, 0.751477], abs=1e-6)


def test_decay_is_a_weighted_mean():
    """p(label) = 1/2, 1/4 and, in an ignored row, whatever: (1 * ln 2 + e^-1 * ln 4) / (1 + e^-1) with gamma 1."""
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)], [5.0, -5.0]])
    labels = torch.tensor([0, 0, IGNORED])
    # (0.693147 + 0.367879 * 1.386294) / 1.367879 = 0.879561
    assert objective_loss(logits, labels, Objective("decay", 1.0)).item() == pytest.approx(0.879561, abs=1e-5)


def test_weights_of_two_rows():
    """q = 1/2, 1/5; alpha 1/2: c = 3/4, 3/5; C = 3/4, 9/20; w = 6/5, 9/20."""
    weights = confidence_weights(torch.tensor([0.5, 0.2]), torch.tensor([True, True]), alpha=0.5)
    assert weights.tolist() == pytest.approx([1.2, 0.45])


def test_sure_and_hopeless_blocks():
    """Sure: every C is 1, so w counts the rows from k on. Hopeless: C = 1/2, 1/4, 1/8."""
    weights = confidence_weights(torch.tensor([[1.0] * 3, [0.0] * 3]), torch.ones(2, 3, dtype=torch.bool), alpha=0.5)
    assert weights.tolist() == [[3.0, 2.0, 1.0], [0.875, 0.375, 0.125]]


def test_rows_without_a_label_neither_count_nor_break_the_run():
    known = torch.tensor([True, False, True])
    weights = confidence_weights(torch.tensor([0.5, 0.0, 0.2]), known, alpha=0.5)
    assert weights.tolist() == pytest.approx([1.2, 0.0, 0.45])


def test_d_pace_of_two_blocks():
    """Block 0: q = 1/2, 1/5 and the weights above. Block 1: q = 1/2, c = w = 3/4. A third has no label."""
    logits = torch.tensor([[[1.0, 1.0], [1.0, 4.0]], [[1.0, 1.0], [7.0, 1.0]], [[1.0, 9.0], [3.0, 1.0]]]).log()
    labels = torch.tensor([[0, 0], [1, IGNORED], [IGNORED, IGNORED]])
    # (1.2 ln 2 + 0.45 ln 5 + 0.75 ln 2) / 2 = (0.831777 + 0.724247 + 0.519860) / 2
    assert objective_loss(logits, labels, D_PACE).item() == pytest.approx(1.037942, abs=1e-5)


def test_kl_of_two_distributions():
    """p = 1/2, 1/2 and q = 1/4, 3/4: ln 2 / 2 + ln(2/3) / 2 = 0.143841. The other way round it is 0.130812."""
    draft, target = torch.tensor([[1.0, 3.0]]).log(), torch.zeros(1, 2)
    assert kl_divergences(draft, target, 1.0).item() == pytest.approx(0.143841, abs=1e-6)
    # Temperature 1/2 squares and renormalises: q = 1/10, 9/10: ln 5 / 2 + ln(5/9) / 2.
    assert kl_divergences(draft, target, 0.5).item() == pytest.approx(0.510826, abs=1e-6)


def test_mixture_of_two_rows():
    """Decay with gamma 1, a quarter KL. Row 0 as above with label 0: ln 4 and 0.143841; row 1 agrees: ln 2 and 0."""
    logits = torch.tensor([[1.0, 3.0], [1.0, 1.0]]).log()
    loss = objective_loss(logits, torch.tensor([0, 1]), Objective("decay", 1.0, kl_weight=0.25), torch.zeros(2, 2))
    # (0.75 * 1.386294 + 0.25 * 0.143841 + e^-1 * 0.75 * 0.693147) / (1 + e^-1)
    assert loss.item() == pytest.approx(0.926202, abs=1e-5)


@pytest.mark.parametrize("kind", ["decay", "d-pace"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
def test_random_blocks_follow_the_statement(kind: str, kl_weight: float):
    logits, target, labels = random_blocks()
    objective = Objective(kind, gamma=3.0, alpha=0.4, kl_weight=kl_weight)
    total, divisor = stated(logits.detach(), labels, objective, target)
    sums = objective_sums(logits, labels, objective, target)
    assert [part.item() for part in sums] == pytest.approx([total, divisor], rel=1e-5)
    assert objective_loss(logits, labels, objective, target).item() == pytest.approx(total / divisor, rel=1e-5)


@pytest.mark.parametrize("kind", ["decay", "d-pace"])
def test_sums_add_up_over_chunks(kind: str):
    logits, target, labels = random_blocks()
    objective = Objective(kind, kl_weight=0.3)
    pieces = [objective_sums(logits[i : i + 2], labels[i : i + 2], objective, target[i : i + 2]) for i in (0, 2, 4)]
    for part, whole in zip(zip(*pieces, strict=True), objective_sums(logits, labels, objective, target), strict=True):
        torch.testing.assert_close(sum(part), whole)


def test_weights_are_held_constant():
    """With one row a block, the gradient of w * -ln q is w (q - 1) at the label, without a term from w's own slope."""
    logits = torch.zeros(1, 2, requires_grad=True)
    objective_loss(logits, torch.tensor([0]), D_PACE).backward()
    assert logits.grad.tolist() == [pytest.approx([-0.375, 0.375])]  # w = 3/4, q = 1/2


@pytest.mark.parametrize("kind", ["decay", "d-pace"])
def test_rows_without_a_label_get_no_gradient(kind: str):
    logits, target, labels = random_blocks()
    target.requires_grad_()
    objective_loss(logits, labels, Objective(kind, kl_weight=0.5), target).backward()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, labels != IGNORED)
    assert target.grad is None


@pytest.mark.parametrize("objective", [Objective("decay"), D_PACE, Objective("d-pace", kl_weight=0.5)])
def test_no_label_gives_zero_with_a_gradient(objective: Objective):
    logits = torch.randn(2, 3, 4, requires_grad=True)
    loss = objective_loss(logits, torch.full((2, 3), IGNORED), objective, torch.randn(2, 3, 4))
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("kind", ["decay", "d-pace"])
def test_bf16_logits_are_summed_in_fp32(kind: str):
    logits, target, labels = (tensor.detach() for tensor in random_blocks())
    objective = Objective(kind, kl_weight=0.5)
    logits, target = logits.bfloat16(), target.bfloat16()
    loss = objective_loss(logits, labels, objective, target)
    assert loss.dtype == torch.float32
    assert loss == objective_loss(logits.float(), labels, objective, target.float())


def test_target_rows_of_literal_anchors():
    """Blocks of 4 draft 3: anchor 1 takes positions 1, 2, 3, and anchor 4 of 6 takes 4, 5 and, past the end, 5."""
    rows = torch.arange(12).view(2, 6, 1)
    found = target_rows(rows, torch.tensor([[1, 4], [0, 5]]), block_size=4)
    assert found.squeeze(-1).tolist() == [[[1, 2, 3], [4, 5, 5]], [[6, 7, 8], [11, 11, 11]]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "dpace"}, "kind = 'dpace'"),
        ({"gamma": 0.0}, "gamma = 0.0"),
        ({"gamma": math.nan}, "gamma = nan"),
        ({"alpha": 0.0}, "alpha = 0.0"),
        ({"alpha": 1.5}, "alpha = 1.5"),
        ({"kl_weight": -0.1}, "kl_weight = -0.1"),
        ({"kl_weight": 1.1}, "kl_weight = 1.1"),
        ({"kl_temperature": 0.0}, "kl_temperature = 0.0"),
    ],
)
def test_impossible_fields_are_named(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Objective(**{"kind": "decay"} | fields)


def test_kl_needs_the_targets_logits():
    logits, target, labels = random_blocks()
    objective = Objective("decay", kl_weight=0.5)
    with pytest.raises(ValueError, match="target_logits is missing"):
        objective_loss(logits, labels, objective)
    with pytest.raises(ValueError, match=r"target_logits \[1, 5, 7\] is not of logits' shape \[6, 5, 7\]"):
        objective_loss(logits, labels, objective, target[:1])
