# SPDX-License-Identifier: Apache-2.0
"""The hook on the target.

vLLM's `SupportsEagle3` models return the residual stream after chosen layers beside their last hidden states. The
runner asks for the drafter's `aux_hidden_state_layer_ids`; side by side, [T, F*H], they are the context features.
"""

from __future__ import annotations

from torch import nn
from vllm.model_executor.models.interfaces import supports_eagle3


def check_target(target: nn.Module) -> None:
    """Raise ValueError unless `target` can hand out hidden states of its inner layers."""
    if not supports_eagle3(target):
        raise ValueError(
            f"the target's vLLM model class {type(target).__name__} does not hand out hidden states of inner layers "
            "(vLLM's SupportsEagle3 interface), which DFlash needs. Serve it without --speculative-config."
        )
