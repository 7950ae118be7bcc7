# SPDX-License-Identifier: Apache-2.0
"""The V2 model runner's choice of a speculator, and of what it asks about a model between its steps.

Patches: the names `init_speculator` and `init_model_state` in `vllm.v1.worker.gpu.model_runner`. Reason: both choose by
if-chains over methods and models. Added: this package's adapter for plain DFlash drafters, and where these draft trees
a model state that verifies them; all others get what vLLM chooses. Removable when vLLM has registries of both.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_dflash.compat import patching
from vllm_dflash.compat.ownership import draft_tree, drafts_here

if TYPE_CHECKING:
    import torch
    from torch import nn
    from vllm.config import VllmConfig


def install(model_runner: ModuleType) -> None:
    """Patch `vllm.v1.worker.gpu.model_runner`."""
    make, make_state = model_runner.init_speculator, model_runner.init_model_state

    def init_speculator(vllm_config: VllmConfig, device: torch.device, req_states: Any) -> Any:
        """vLLM's function, with our adapter for our engines. Same signature."""
        if not drafts_here(vllm_config):
            return make(vllm_config, device, req_states)
        from vllm_dflash.compat.runner_v2 import V2Adapter

        return V2Adapter(vllm_config, device)

    def init_model_state(vllm_config: VllmConfig, model: nn.Module, encoder_cache: Any, device: torch.device) -> Any:
        """vLLM's function, with ours for targets that verify trees. Same signature."""
        shape = draft_tree(vllm_config) if drafts_here(vllm_config) else None
        if shape is None:
            return make_state(vllm_config, model, encoder_cache, device)
        from vllm_dflash.compat.trees.model_state import TreeModelState, check_target_state

        check_target_state(vllm_config, model)
        return TreeModelState(vllm_config, model, encoder_cache, device, shape)

    patching.replace(model_runner, "init_speculator", init_speculator)
    patching.replace(model_runner, "init_model_state", init_model_state)
