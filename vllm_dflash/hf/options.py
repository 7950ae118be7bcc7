# SPDX-License-Identifier: Apache-2.0
"""What a user asks of `spec_generate`, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList

from vllm_dflash.hf.budget import BUDGETS
from vllm_dflash.hf.calibration import Calibration
from vllm_dflash.hf.choosing import Sampling
from vllm_dflash.hf.drafting import DraftRule
from vllm_dflash.hf.sequences import Limits
from vllm_dflash.options import AUTO
from vllm_dflash.whole_numbers import is_whole

#: Each node sees each other one, or not: wider trees take seconds a round to lay out.
_MOST_NODES = 1024
DRAFT_SAMPLE_METHODS = ("greedy", "probabilistic")


@dataclass(frozen=True)
class Options:
    """How to generate. What each means: `DFlashDraftModel.spec_generate`."""

    limits: Limits
    sampling: Sampling = Sampling()
    tree_budget: int | str | None = None
    draft_sample_method: str | None = None
    calibration: Calibration | None = None
    logits_processor: LogitsProcessorList | None = None
    streamer: Any = None
    compile: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError naming the argument and the values seen."""
        if self.tree_budget not in (None, AUTO) and not is_whole(self.tree_budget, most=_MOST_NODES):
            raise ValueError(
                f"tree_budget must be None, 'auto' or a number of nodes from 1 to {_MOST_NODES}, "
                f"found {self.tree_budget!r}"
            )
        if self.draft_sample_method not in (None, *DRAFT_SAMPLE_METHODS):
            raise ValueError(
                f"draft_sample_method must be one of {', '.join(DRAFT_SAMPLE_METHODS)}, "
                f"found {self.draft_sample_method!r}"
            )
        if self.draft_sample_method == "probabilistic":
            self._check_probabilistic()
        if self.compile and self.logits_processor:
            names = [type(one).__name__ for one in self.logits_processor]
            raise ValueError(f"compile=True runs rounds without the host, where logits_processor = {names} needs texts")

    def _check_probabilistic(self) -> None:
        for argument, value in (("tree_budget", self.tree_budget), ("logits_processor", self.logits_processor)):
            if value:
                raise ValueError(
                    f"draft_sample_method='probabilistic' is for plain chains, found {argument} = {value!r} too"
                )
        if self.sampling.is_greedy:
            raise ValueError(
                "draft_sample_method='probabilistic' needs a temperature above 0, "
                f"found temperature = {self.sampling.temperature}"
            )

    @property
    def rule(self) -> DraftRule:
        """What to draft.

        Where a target samples, a chain's samples are accepted more often than its likeliest tokens, and calibration
        adds to acceptance. Greedy targets of well trained drafters gain nothing from it.
        """
        goes_on = self.calibration is not None
        if self.tree_budget is not None:
            num_nodes = max(BUDGETS) if isinstance(self.tree_budget, str) else self.tree_budget
            return DraftRule(num_nodes, self.sampling, False, goes_on or not self.sampling.is_nearly_greedy)
        greedy = self.sampling.is_greedy or self.logits_processor or self.draft_sample_method == "greedy"
        return DraftRule(None, self.sampling, not greedy, goes_on or not self.sampling.is_greedy)


def check_batch(
    options: Options,
    input_ids: torch.Tensor,  # [B, P]
) -> None:
    """Raises ValueError where a batch cannot have these options."""
    if options.streamer is not None and len(input_ids) > 1:
        raise ValueError(f"a streamer takes one sequence, and input_ids has {len(input_ids)}")
    if options.compile:
        check_device(input_ids)


def check_calibration(calibration: Calibration | None, num_depths: int) -> None:
    """Raises ValueError for that of another drafter."""
    if calibration is not None and calibration.factors.shape != (num_depths,):
        raise ValueError(
            f"calibration is of {len(calibration.factors)} depths, and this drafter has {num_depths}: "
            "it was learned with another one"
        )


def check_device(
    input_ids: torch.Tensor,  # [B, P]
) -> None:
    """Raises ValueError naming the device where there are no CUDA graphs."""
    if not input_ids.is_cuda:
        raise ValueError(f"compile=True makes CUDA graphs, and input_ids is on {input_ids.device}")
