# SPDX-License-Identifier: Apache-2.0
"""The hook on the target: which of its layers are tapped, and their outputs as context features.

vLLM's `SupportsEagle3` models return the residual stream after chosen layers beside their last hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from vllm.model_executor.models.interfaces import supports_eagle3

from vllm_dflash.config import DFlashConfig


def tap_target(target: nn.Module, config: DFlashConfig) -> None:
    """Make `target` return the outputs of the drafter's target layers. Raises ValueError when it cannot."""
    if not supports_eagle3(target):
        raise ValueError(
            f"the target's vLLM model class {type(target).__name__} does not hand out hidden states of inner layers "
            "(vLLM's SupportsEagle3 interface), which DFlash needs. Serve it without --speculative-config."
        )
    target.set_aux_hidden_state_layers(config.aux_hidden_state_layer_ids)


def concat_features(
    aux_hidden_states: Sequence[torch.Tensor],  # F tensors [>= T, H]
    num_rows: int,
) -> torch.Tensor:
    """Context features of the first `num_rows` target rows, [T, F*H], in the order of the tapped layers."""
    return torch.cat([states[:num_rows] for states in aux_hidden_states], dim=-1)
