# SPDX-License-Identifier: Apache-2.0
"""The target's token after a row: its argmax, or a sample of its distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from vllm_dflash.calibration import SAMPLES_FROM

#: Below it, logits divided by the temperature leave fp32's range.
SMALLEST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How a target speaks. temperature 0: its likeliest token; top_k and top_p as in `generate`."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        """Raise ValueError naming the argument and its value."""
        if not math.isfinite(self.temperature):
            raise ValueError(f"temperature must be a finite number, found {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be at least 1, or 0 for all tokens, found {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, found {self.top_p}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < SMALLEST_TEMPERATURE

    @property
    def is_nearly_greedy(self) -> bool:
        """Whether nearly always the likeliest token is taken."""
        return self.temperature < SAMPLES_FROM

    @property
    def tree_temperature(self) -> float:
        """By which a drafter's logits are divided for a tree."""
        return 1.0 if self.is_nearly_greedy else self.temperature

    def choose(
        self,
        logits: torch.Tensor,  # [..., V]
    ) -> torch.Tensor:
        """A token for every row, [...] int64."""
        return logits.argmax(dim=-1) if self.is_greedy else self.sample(self.probs(logits))

    def probs(
        self,
        logits: torch.Tensor,  # [..., V]
    ) -> torch.Tensor:
        """The distribution that is sampled from, [..., V] fp32. Not for greedy ones."""
        return self.warped(logits.float() / self.temperature).softmax(dim=-1)

    def warped(
        self,
        logits: torch.Tensor,  # [..., V] fp32, tempered
    ) -> torch.Tensor:
        """With -inf for what top_k and top_p leave out, [..., V]."""
        rows = self._warpers()(torch.empty(0), logits.flatten(0, -2))  # warpers look at no input_ids
        return rows.view(logits.shape)

    def sample(
        self,
        probs: torch.Tensor,  # [..., V] fp32; need not sum to one
    ) -> torch.Tensor:
        """A token for every row, [...] int64.

        Of exponential variables of rates p, the smallest is that of i with probability p_i. `torch.multinomial` does
        the same, but waits for the device to check its arguments.
        """
        return (probs / torch.empty_like(probs).exponential_(generator=self.generator)).argmax(dim=-1)

    def _warpers(self) -> LogitsProcessorList:
        warpers = LogitsProcessorList()
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers
