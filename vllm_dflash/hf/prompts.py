# SPDX-License-Identifier: Apache-2.0
"""What a user passes to `spec_generate`, checked, and put so that all prompts of a batch end together.

Letters: B prompts, P tokens of the longest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from vllm_dflash.hf.modeling import DFlashDraftModel


@dataclass(frozen=True)
class Prompts:
    """Prompts padded on the left, no wider than the longest of them."""

    token_ids: torch.Tensor  # [B, P] int64
    is_real: torch.Tensor  # [B, P] bool; False: padding
    lengths: list[int]  # B
    as_given: torch.Tensor  # [B, P or more]; with padding that all of them have

    @property
    def positions(self) -> torch.Tensor:
        """[B, P]; padding is at position 0."""
        return (self.is_real.cumsum(dim=1) - 1).clamp(min=0)


def read_prompts(
    input_ids: torch.Tensor,  # [B, P]
    attention_mask: torch.Tensor | None,  # [B, P]; 0: padding, on either side
) -> Prompts:
    """Raises ValueError naming the argument, the row and the shapes seen."""
    if not isinstance(input_ids, torch.Tensor):
        raise ValueError(
            f"input_ids must be a tensor [B, P], or what a tokenizer returns, found {type(input_ids).__name__}"
        )
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids must be non-empty prompts [B, P], found shape {list(input_ids.shape)}")
    if attention_mask is None:
        is_real = torch.ones_like(input_ids, dtype=torch.bool)
    elif attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask {list(attention_mask.shape)} is not of input_ids' {list(input_ids.shape)}")
    else:
        is_real = attention_mask.bool()
    lengths = is_real.sum(dim=1).tolist()
    empty = [row for row, length in enumerate(lengths) if not length]
    if empty:
        raise ValueError(f"attention_mask leaves no token of the prompts in rows {empty}: all of them is padding")
    # A stable sort by "is real" moves padding to the left and keeps each prompt's order.
    order = is_real.to(torch.uint8).sort(dim=1, stable=True).indices
    moved, longest = input_ids.gather(1, order), max(lengths)
    return Prompts(moved[:, -longest:], is_real.gather(1, order)[:, -longest:], lengths, moved)


def check_pair(draft: DFlashDraftModel, target: nn.Module, prompts: Prompts) -> None:
    """Does the drafter belong to this target, and do the prompts fit it? Raises ValueError naming what differs."""
    config, dflash = target.config.get_text_config(decoder=True), draft.dflash
    for name, mine, theirs in (
        ("hidden size", dflash.target_hidden_size, config.hidden_size),
        ("vocabulary", dflash.vocab_size, config.vocab_size),
    ):
        if mine != theirs:
            raise ValueError(
                f"{dflash.source} was trained for a target of {name} {mine}, and {type(target).__name__} has {theirs}: "
                "this drafter belongs to another target"
            )
    if draft.dtype != target.dtype:
        raise ValueError(f"the drafter's dtype is {draft.dtype} and the target's is {target.dtype}: load both alike")
    limit, longest = getattr(config, "max_position_embeddings", None), max(prompts.lengths)
    if limit is not None and longest > limit:
        raise ValueError(f"a prompt of {longest} tokens is longer than the target's {limit} positions")
