# SPDX-License-Identifier: Apache-2.0
"""The V2 model runner's choice of a speculator, and of what it asks about a model between its steps.

Patches: the names `init_speculator`, `init_model_state` and `maybe_create_adaptive_verification_manager` in
`vllm.v1.worker.gpu.model_runner`. Reason: these choose by if-chains over methods and models. Added: this package's
adapter for plain DFlash drafters, and where these draft trees a model state that verifies them and a budget for them;
all others get what vLLM chooses. Removable when vLLM has registries of them.

Patches there too: `ModelCudaGraphManager`. Reason: with adaptive verification it has graphs of one kind. Added: where
trees follow the load, also graphs for steps without candidates. Removable when its graphs know how many rows a request
has. And `resolve_adaptive_cudagraph_mode`. Reason: it takes an engine without CUDA graphs for a mistake. Added: such
engines keep their mode. Removable when adaptive verification runs eagerly.

Patches `GPUModelRunner.finish_requests` there. Reason: a speculator is not told of requests that end or are preempted,
and what it writes late must not meet their slots' next owners. Added: our adapter is told first. Removable when vLLM
tells its speculator.
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
    make_budget = model_runner.maybe_create_adaptive_verification_manager
    choose_mode = model_runner.resolve_adaptive_cudagraph_mode
    make_graphs = model_runner.ModelCudaGraphManager
    finish = model_runner.GPUModelRunner.finish_requests

    def init_speculator(vllm_config: VllmConfig, device: torch.device, req_states: Any) -> Any:
        """vLLM's function, with our adapter for our engines. Same signature."""
        if not drafts_here(vllm_config):
            return make(vllm_config, device, req_states)
        from vllm_dflash.compat.runner_v2 import V2Adapter

        return V2Adapter(vllm_config, device)

    def init_model_state(vllm_config: VllmConfig, model: nn.Module, encoder_cache: Any, device: torch.device) -> Any:
        """vLLM's function, with ours for targets that verify trees. Same signature."""
        shape = draft_tree(vllm_config)
        if shape is None:
            return make_state(vllm_config, model, encoder_cache, device)
        from vllm_dflash.compat.trees.model_state import TreeModelState, check_target_state

        check_target_state(vllm_config, model)
        return TreeModelState(vllm_config, model, encoder_cache, device, shape)

    def make_adaptive_verification(*, enable_adaptive_verification: Any, **options: Any) -> Any:
        """vLLM's function; our speculator's answer to whether it is enabled is the budget itself. Same signature."""
        if enable_adaptive_verification in (True, False):
            return make_budget(enable_adaptive_verification=enable_adaptive_verification, **options)
        names = ("req_states", "query_start_loc", "num_bonus_tokens", "max_total_logits")
        return enable_adaptive_verification.begin(*(options[name] for name in names))

    def resolve_mode(mode: Any, *, piecewise_capture_available: bool) -> Any:
        """vLLM's function for modes with full graphs. Same signature."""
        if not mode.has_full_cudagraphs():
            return mode
        return choose_mode(mode, piecewise_capture_available=piecewise_capture_available)

    def make_cudagraph_manager(vllm_config: VllmConfig, device: torch.device, mode: Any, **options: Any) -> Any:
        """vLLM's class, or ours where trees follow the load. Same signature."""
        shape = draft_tree(vllm_config)
        if shape is None or not shape.is_auto:
            return make_graphs(vllm_config, device, mode, **options)
        from vllm_dflash.compat.trees.graphs import TreeGraphs

        return TreeGraphs(vllm_config, device, mode, **options)

    def finish_requests(self: Any, scheduler_output: Any) -> None:
        """vLLM's method, which begins a step. Same signature."""
        if drafts_here(self.vllm_config) and self.speculator is not None:
            self.speculator.before_step(scheduler_output)
        finish(self, scheduler_output)

    patching.replace(model_runner.GPUModelRunner, "finish_requests", finish_requests)
    patching.replace(model_runner, "init_speculator", init_speculator)
    patching.replace(model_runner, "ModelCudaGraphManager", make_cudagraph_manager)
    patching.replace(model_runner, "maybe_create_adaptive_verification_manager", make_adaptive_verification)
    patching.replace(model_runner, "resolve_adaptive_cudagraph_mode", resolve_mode)
    patching.replace(model_runner, "init_model_state", init_model_state)
