# SPDX-License-Identifier: Apache-2.0
"""What the rows of a target's forward may see, in the form that Transformers' decoders take.

Letters: B sequences, Q rows, S slots of the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

#: Kinds of layers in `config.layer_types` that keep K/V of single tokens and no state in between.
_FULL, _SLIDING = "full_attention", "sliding_attention"


class TargetMasks:
    """Masks for one target: one tensor, or one for each kind of layer where it has sliding windows.

    Raises ValueError for a target with recurrent state, which cannot forget a rejected draft.
    """

    def __init__(self, target: nn.Module) -> None:
        config = target.config.get_text_config(decoder=True)
        kinds = getattr(config, "layer_types", None)
        unknown = sorted(set(kinds or ()) - {_FULL, _SLIDING})
        if unknown:
            raise ValueError(
                f"{type(target).__name__} has layers of type {unknown}, whose state cannot forget rejected drafts: "
                "speculative decoding needs a target of attention layers"
            )
        window = getattr(config, "sliding_window", None)
        if kinds is None and not getattr(config, "use_sliding_window", True):
            window = None
        self.is_flash = "flash" in str(config._attn_implementation)
        self.window = window
        # Only models of both kinds take one mask for each.
        self.by_kind = kinds is not None and {_FULL, _SLIDING} <= set(kinds)
        self.all_sliding = window is not None and (kinds is None or set(kinds) == {_SLIDING})

    def __call__(
        self,
        visible: torch.Tensor,  # [B, Q, S] bool
        positions: torch.Tensor,  # [B, Q] of the rows
        lengths: torch.Tensor | None,  # [B]; the rows are in the slots right behind so many; None: at their positions
        dtype: torch.dtype,
    ) -> Any:
        """Additive masks [B, 1, Q, S], by kind of layer where there are several.

        None for FlashAttention: it takes no mask, and a single chain's rows are what it calls causal.
        """
        if self.is_flash:
            return None
        if not (self.by_kind or self.all_sliding):
            return additive(visible, dtype)
        num_slots = visible.shape[2]
        if lengths is None:
            slot_positions = torch.arange(num_slots, device=positions.device)[None]
        else:
            slot_positions = positions_of_slots(lengths, positions, num_slots)
        behind = positions[:, :, None] - slot_positions[:, None]
        sliding = additive(visible & (behind < self.window), dtype)
        return {_FULL: additive(visible, dtype), _SLIDING: sliding} if self.by_kind else sliding


def check_attention(target: nn.Module, num_sequences: int, is_tree: bool, compile: bool) -> None:
    """Raises ValueError for what FlashAttention cannot do: it sees causally, up to the last slot that it is given."""
    name = str(target.config.get_text_config(decoder=True)._attn_implementation)
    if "flash" not in name:
        return
    for what, asked in (("a draft tree", is_tree), (f"{num_sequences} sequences", num_sequences > 1),
                        ("compile=True", compile)):  # fmt: skip
        if asked:
            raise ValueError(
                f"attn_implementation = {name!r} takes no mask, which {what} needs: "
                "load the target with attn_implementation='sdpa'"
            )


def additive(
    visible: torch.Tensor,  # [B, Q, S] bool
    dtype: torch.dtype,
) -> torch.Tensor:
    """0 where visible, else the lowest number, [B, 1, Q, S]."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def prompt_visibility(
    positions: torch.Tensor,  # [B, P]
) -> torch.Tensor:
    """Prompt rows see themselves and what stands before them, [B, P, P] bool."""
    slots = torch.arange(positions.shape[1], device=positions.device)
    return slots <= positions[:, :, None]


def candidate_visibility(
    lengths: torch.Tensor,  # [B]; slots in use
    ancestors: torch.Tensor,  # [B, Q, Q] bool
    num_slots: int,  # S
) -> torch.Tensor:
    """Candidate rows, in the slots right behind their sequence, see all of it and their ancestors, [B, Q, S] bool."""
    num_rows = ancestors.shape[1]
    visible = torch.arange(num_slots, device=lengths.device) < lengths[:, None]
    visible = visible[:, None].repeat(1, num_rows, 1)
    behind = lengths[:, None] + torch.arange(num_rows, device=lengths.device)
    return visible.scatter_(2, behind[:, None].expand(-1, num_rows, -1), ancestors)


def positions_of_slots(
    lengths: torch.Tensor,  # [B]
    row_positions: torch.Tensor,  # [B, Q] of the rows right behind each sequence
    num_slots: int,  # S
) -> torch.Tensor:
    """A slot's position, [B, S]: its number, but for candidates, of which several may share a position."""
    positions = torch.arange(num_slots, device=lengths.device).repeat(lengths.shape[0], 1)
    behind = lengths[:, None] + torch.arange(row_positions.shape[1], device=lengths.device)
    return positions.scatter_(1, behind, row_positions)
