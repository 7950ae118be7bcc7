# SPDX-License-Identifier: Apache-2.0
"""Hidden states of the query rows -> draft tokens.

Greedy drafts are lossless at every temperature: vLLM's rejection sampler takes them for a distribution with all its
mass on the draft, accepts the draft with the target's probability of it, and else samples from the rest.
"""

from __future__ import annotations

import torch

from vllm_dflash.model_executor.draft_model import DFlashDraftModel
from vllm_dflash.proposer.step import Drafts


def greedy_drafts(
    model: DFlashDraftModel,
    hidden_states: torch.Tensor,  # [R*Q, H]
    num_query_rows: int,
) -> Drafts:
    """The likeliest token of each mask row. The anchor's row predicts nothing: its token is known."""
    masks = hidden_states.unflatten(0, (-1, num_query_rows))[:, 1:]  # [R, K, H]
    return Drafts(model.top_tokens(masks.flatten(0, 1)).view(masks.shape[:2]))
