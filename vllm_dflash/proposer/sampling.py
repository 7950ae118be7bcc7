# SPDX-License-Identifier: Apache-2.0
"""Hidden states of the query rows -> draft tokens.

Greedy drafts are lossless at every temperature: vLLM's rejection sampler takes them for a distribution with all its
mass on the draft, accepts the draft with the target's probability of it, and else samples from the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_dflash.model_executor.draft_model import DFlashDraftModel
from vllm_dflash.proposer.step import BlockInputs, Drafts

#: (model, hidden states [R*Q, H], the block they are of) -> drafts [R, K].
Sampler = Callable[[DFlashDraftModel, torch.Tensor, BlockInputs], Drafts]


def mask_rows(
    hidden_states: torch.Tensor,  # [R*Q, H]
    num_query_rows: int,
) -> torch.Tensor:
    """The rows that predict, [R*K, H]. The anchor's row predicts nothing: its token is known."""
    return hidden_states.unflatten(0, (-1, num_query_rows))[:, 1:].flatten(0, 1)


def greedy_drafts(
    model: DFlashDraftModel,
    hidden_states: torch.Tensor,  # [R*Q, H]
    block: BlockInputs,
) -> Drafts:
    """The likeliest token of each mask row."""
    tokens = model.get_top_tokens(mask_rows(hidden_states, block.num_query_rows))
    return Drafts(tokens.view(-1, block.num_query_rows - 1))
