# SPDX-License-Identifier: Apache-2.0
"""The V2 model runner's choice of a speculator.

Patch: the name `init_speculator` in `vllm.v1.worker.gpu.model_runner`. Reason: it chooses by an if-chain over method
names. Added: this package's adapter for plain DFlash drafters; all others get what vLLM chooses. Removable when vLLM
has a registry of speculators.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_dflash.compat import patching
from vllm_dflash.compat.ownership import drafts_here

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig


def install(model_runner: ModuleType) -> None:
    """Patch `vllm.v1.worker.gpu.model_runner`."""
    make = model_runner.init_speculator

    def init_speculator(vllm_config: VllmConfig, device: torch.device, req_states: Any) -> Any:
        """vLLM's function, with our adapter for our engines. Same signature."""
        if not drafts_here(vllm_config):
            return make(vllm_config, device, req_states)
        from vllm_dflash.compat.runner_v2 import V2Adapter

        return V2Adapter(vllm_config, device)

    patching.replace(model_runner, "init_speculator", init_speculator)
