# SPDX-License-Identifier: Apache-2.0
"""How sure a drafter may be: a temperature for each depth, fitted while generating on what the target said.

Drafters are over-confident, the more so when the target samples. A tree built from such probabilities is too narrow,
and a sampled draft too rarely right. Every round tells, up to the first rejected depth, which token the target said
there: an observation of the drafter's distribution at that depth. The factor on the logits, 1/temperature, maximises
their likelihood, by one Newton step a round on the log-likelihood so far (its curvature is the variance of the logits).

Letters: B sequences, D depths, C choices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_dflash.calibration import LARGEST, LOWEST_LOGIT, PRIOR_INFORMATION, SMALLEST


@dataclass(frozen=True)
class Choices:
    """The likeliest tokens of every depth, descending."""

    logits: torch.Tensor  # [B, D, C] fp32, uncalibrated
    token_ids: torch.Tensor  # [B, D, C] int64


@dataclass(frozen=True)
class Calibration:
    """What is known of a drafter so far."""

    factors: torch.Tensor  # [D] fp32; on the logits
    information: torch.Tensor  # [D] fp32; the curvature of the log-likelihood of all observations

    @classmethod
    def fresh(cls, num_depths: int, device: torch.device) -> Calibration:
        """Nothing."""
        return cls(torch.ones(num_depths, device=device), torch.zeros(num_depths, device=device))

    def clone(self) -> Calibration:
        """The same in memory of its own."""
        return Calibration(self.factors.clone(), self.information.clone())

    def learned(
        self,
        choices: Choices,
        said: torch.Tensor,  # [B, D] int64; the target's tokens
        num_said: torch.Tensor,  # [B]; how many of them count
    ) -> Calibration:
        """With the observations of a round. A token that is not among the choices says nothing."""
        logits = choices.logits.clamp(min=LOWEST_LOGIT)
        probs = (logits * self.factors[:, None]).softmax(dim=-1)
        mean = (probs * logits).sum(dim=-1)  # [B, D]
        variance = (probs * (logits - mean[..., None]).square()).sum(dim=-1)
        is_said = (choices.token_ids == said[..., None]) & (choices.logits > LOWEST_LOGIT)
        depths = torch.arange(said.shape[1], device=said.device)
        counts = is_said.any(dim=-1) & (depths < num_said[:, None])
        slope = (logits * is_said).sum(dim=-1) - mean
        information = self.information + (variance * counts).sum(dim=0)
        step = (slope * counts).sum(dim=0) / (information + PRIOR_INFORMATION)
        return Calibration((self.factors + step).clamp(SMALLEST, LARGEST), information)
