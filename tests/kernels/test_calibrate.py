# SPDX-License-Identifier: Apache-2.0
"""Calibration of a drafter: against the same in plain torch, and against a drafter whose error is known."""

from __future__ import annotations

import pytest
import torch

from vllm_dflash.hf.calibration import Calibration, Choices
from vllm_dflash.kernels.calibrate import GREEDY, MOST_INFORMATION, SAMPLED, Observations, calibrate

DEPTHS, CHOICES = 3, 6


def observations(num_rows: int, device: str, seed: int = 0) -> Observations:
    """Every row of the state has choices, descending, and a target's token at each depth."""
    generator = torch.Generator().manual_seed(seed)
    seen = Observations.allocate(num_rows, DEPTHS, CHOICES, torch.device(device))
    logits = 2 * torch.randn(num_rows, DEPTHS, CHOICES, generator=generator)
    tokens = torch.rand(num_rows, DEPTHS, 40, generator=generator).argsort(dim=-1)[..., :CHOICES]
    seen.logits.copy_(logits.sort(dim=-1, descending=True).values)
    seen.token_ids.copy_(tokens)
    chosen = torch.randint(0, CHOICES, (num_rows, DEPTHS, 1), generator=generator)
    seen.said.copy_(tokens.gather(2, chosen)[..., 0])
    seen.num_said.copy_(torch.randint(0, DEPTHS + 1, (num_rows,), generator=generator))
    return seen


def expected(seen: Observations, rows: list[int], kind: int) -> Calibration:
    """What these rows say, by the Transformers backend's arithmetic."""
    choices = Choices(seen.logits[rows].cpu(), seen.token_ids[rows].long().cpu())
    before = Calibration(seen.factors[kind].cpu().clone(), seen.information[kind].cpu().clone())
    return before.learned(choices, seen.said[rows].long().cpu(), seen.num_said[rows].cpu())


@pytest.mark.parametrize("num_rows", [5, 40])
def test_as_in_torch(device: str, num_rows: int) -> None:
    """Rows of the state in another order, of nobody, and of two kinds of requests, batch after batch."""
    seen = observations(num_rows, device)
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(1)).tolist()
    rows = order[: num_rows - 1]
    temperature = torch.zeros(num_rows, device=device)
    temperature[::3] = 0.8
    temperature[1::3] = 0.3  # as at 0: the likeliest token, nearly always
    state_rows = torch.tensor([*rows, -1, -1], device=device)
    for _ in range(3):
        kinds = {GREEDY: [row for row in rows if row % 3], SAMPLED: [row for row in rows if row % 3 == 0]}
        wanted = {kind: expected(seen, own, kind) for kind, own in kinds.items()}
        calibrate(seen, state_rows, temperature)
        for kind, calibration in wanted.items():
            torch.testing.assert_close(seen.factors[kind].cpu(), calibration.factors)
            torch.testing.assert_close(seen.information[kind].cpu(), calibration.information)
    assert (seen.factors[GREEDY] != 1).any() and (seen.factors[SAMPLED] != 1).any()


def test_what_was_not_said_teaches_nothing(device: str) -> None:
    seen = observations(4, device)
    seen.num_said.zero_()
    calibrate(seen, torch.arange(4, device=device), torch.zeros(4, device=device))
    assert (seen.factors == 1).all() and (seen.information == 0).all()


def test_a_token_that_was_no_choice_teaches_nothing(device: str) -> None:
    seen = observations(4, device)
    seen.num_said.fill_(DEPTHS)
    seen.said.fill_(99)
    calibrate(seen, torch.arange(4, device=device), torch.zeros(4, device=device))
    assert (seen.factors == 1).all()


def test_a_token_that_cannot_be_drafted_teaches_nothing(device: str) -> None:
    """A choice of logit -inf, where a vocabulary has too few tokens."""
    seen = observations(4, device)
    seen.num_said.fill_(DEPTHS)
    seen.logits[..., -1] = float("-inf")
    seen.said.copy_(seen.token_ids[..., -1])
    calibrate(seen, torch.arange(4, device=device), torch.zeros(4, device=device))
    assert (seen.factors == 1).all() and (seen.information == 0).all()


def test_what_is_remembered_has_an_end(device: str) -> None:
    """Traffic changes: what is new must still count."""
    seen = observations(40, device)
    seen.num_said.fill_(DEPTHS)
    seen.information.fill_(MOST_INFORMATION)
    calibrate(seen, torch.arange(40, device=device), torch.zeros(40, device=device))
    assert (seen.information == MOST_INFORMATION).all() and (seen.factors[GREEDY] != 1).all()


def test_an_over_confident_drafter(device: str) -> None:
    """Its logits are twice the target's, so that half of them is right."""
    generator = torch.Generator().manual_seed(2)
    num_rows = 64
    seen = Observations.allocate(num_rows, 1, CHOICES, torch.device(device))
    everyone, temperature = torch.arange(num_rows, device=device), torch.ones(num_rows, device=device)
    for _ in range(30):
        logits = 1.5 * torch.randn(num_rows, CHOICES, generator=generator)
        said = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
        seen.logits.copy_((2 * logits)[:, None])
        seen.token_ids.copy_(torch.arange(CHOICES).expand(num_rows, 1, -1))
        seen.said.copy_(said)
        seen.num_said.fill_(1)
        calibrate(seen, everyone, temperature)
    assert float(seen.factors[SAMPLED, 0]) == pytest.approx(0.5, abs=0.05)
    assert float(seen.factors[GREEDY, 0]) == 1
