# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""How sure a drafter may be, learned while serving: `vllm_dflash.hf.calibration` for an engine's batches.

A factor on the logits of each depth, for requests that (nearly) always take the likeliest token and for those that
sample. A verification says, up to the first depth where nothing was accepted, what the target's token was: an
observation of the drafter's distribution there. One Newton step on the log-likelihood of all observations is taken for
each batch.

Letters: R requests, S rows of the runner's state, D depths, C choices, M = 2 kinds of requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.triton_utils import tl, triton

from vllm_dflash.calibration import LARGEST, LOWEST_LOGIT, PRIOR_INFORMATION, SAMPLES_FROM, SMALLEST

#: So much is remembered, and no more: traffic changes.
MOST_INFORMATION = 20_000.0
GREEDY, SAMPLED = 0, 1


@dataclass(frozen=True)
class Observations:
    """What is to be learned from, and what has been learned."""

    factors: torch.Tensor  # [M, D] fp32, on the logits
    information: torch.Tensor  # [M, D] fp32, the curvature of the log-likelihood so far
    logits: torch.Tensor  # [S, D, C] fp32 of the likeliest tokens, uncalibrated, up to a constant at each depth
    token_ids: torch.Tensor  # [S, D, C] int32
    said: torch.Tensor  # [S, D] int32 the target's tokens behind the root
    num_said: torch.Tensor  # [S] int32 how many of them count; 0 once they have been learned from

    @classmethod
    def allocate(cls, num_state_rows: int, num_depths: int, num_choices: int, device: torch.device) -> Observations:
        """None yet: all factors are one."""
        of_choices = (num_state_rows, num_depths, num_choices)
        return cls(
            factors=torch.ones(2, num_depths, device=device),
            information=torch.zeros(2, num_depths, device=device),
            logits=torch.zeros(of_choices, device=device),
            token_ids=torch.full(of_choices, -1, dtype=torch.int32, device=device),
            said=torch.zeros(num_state_rows, num_depths, dtype=torch.int32, device=device),
            num_said=torch.zeros(num_state_rows, dtype=torch.int32, device=device),
        )


def calibrate(
    seen: Observations,
    state_rows: torch.Tensor,  # [R] negative: nobody
    temperature: torch.Tensor,  # [S]
) -> None:
    """Learn from what these requests' last verifications said."""
    num_depths, num_choices = seen.logits.shape[1:]
    _calibrate_kernel[(2, num_depths)](
        seen.factors,
        seen.information,
        seen.logits,
        seen.token_ids,
        seen.said,
        seen.num_said,
        state_rows,
        temperature,
        len(state_rows),
        PRIOR_INFORMATION,
        MOST_INFORMATION,
        SMALLEST,
        LARGEST,
        LOWEST_LOGIT,
        SAMPLES_FROM,
        D=num_depths,
        C=num_choices,
        BLOCK_C=triton.next_power_of_2(num_choices),
        BLOCK_R=16,
    )


@triton.jit(do_not_specialize=["num_reqs"])
def _calibrate_kernel(
    factors_ptr,  # [2, D]
    information_ptr,  # [2, D]
    logits_ptr,  # [S, D, C]
    token_ids_ptr,  # [S, D, C]
    said_ptr,  # [S, D]
    num_said_ptr,  # [S]
    state_rows_ptr,  # [R]
    temperature_ptr,  # [S]
    num_reqs,
    prior,
    most,
    smallest,
    largest,
    lowest,
    samples_from,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    kind, depth = tl.program_id(0), tl.program_id(1)
    factor = tl.load(factors_ptr + kind * D + depth)
    choices = tl.arange(0, BLOCK_C)
    slope = 0.0
    curvature = 0.0
    for start in range(0, num_reqs, BLOCK_R):
        requests = start + tl.arange(0, BLOCK_R)
        state_rows = tl.load(state_rows_ptr + requests, mask=requests < num_reqs, other=-1).to(tl.int64)
        is_real = state_rows >= 0
        state_rows = tl.maximum(state_rows, 0)
        samples = tl.load(temperature_ptr + state_rows, mask=is_real, other=0.0) >= samples_from
        counts = is_real & (samples == (kind == 1)) & (depth < tl.load(num_said_ptr + state_rows))
        places = (state_rows * D + depth)[:, None] * C + choices[None, :]
        mask = counts[:, None] & (choices < C)[None, :]
        raw = tl.load(logits_ptr + places, mask=mask, other=float("-inf"))
        logits = tl.maximum(raw, lowest)
        scaled = tl.where(mask, logits * factor, float("-inf"))
        weights = tl.exp(scaled - tl.max(tl.where(mask, scaled, lowest), axis=1)[:, None])
        probs = weights / tl.maximum(tl.sum(weights, axis=1), 1e-30)[:, None]
        logits = tl.where(mask, logits, 0.0)
        mean = tl.sum(probs * logits, axis=1)
        variance = tl.sum(tl.where(mask, probs * (logits - mean[:, None]) * (logits - mean[:, None]), 0.0), axis=1)
        said = tl.load(said_ptr + state_rows * D + depth, mask=counts, other=-2)
        is_said = mask & (tl.load(token_ids_ptr + places, mask=mask, other=-1) == said[:, None]) & (raw > lowest)
        observed = tl.sum(is_said.to(tl.int32), axis=1) > 0
        own = tl.sum(tl.where(is_said, logits, 0.0), axis=1)
        slope += tl.sum(tl.where(observed, own - mean, 0.0), axis=0)
        curvature += tl.sum(tl.where(observed, variance, 0.0), axis=0)
    information = tl.load(information_ptr + kind * D + depth) + curvature
    factor = tl.minimum(tl.maximum(factor + slope / (information + prior), smallest), largest)
    tl.store(factors_ptr + kind * D + depth, factor)
    tl.store(information_ptr + kind * D + depth, tl.minimum(information, most))
