# SPDX-License-Identifier: Apache-2.0
"""The V2 model runner's choice of a speculator.

Patch: the name `init_speculator` in `vllm.v1.worker.gpu.model_runner`. Reason: there is no adapter to the V2 runner,
and a user who installed this plugin should read who drafts instead. Added: one log line. Removable with an adapter.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_dflash.compat import patching
from vllm_dflash.compat.ownership import drafts_here
from vllm_dflash.logs import logger

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig


def install(model_runner: ModuleType) -> None:
    """Patch `vllm.v1.worker.gpu.model_runner`."""
    make = model_runner.init_speculator

    def init_speculator(vllm_config: VllmConfig, device: torch.device, req_states: Any) -> Any:
        """vLLM's function, saying whose speculator it makes. Same signature."""
        if drafts_here(vllm_config):
            logger.warning(
                "vllm_dflash: vLLM's V2 model runner drafts with vLLM's own dflash; VLLM_USE_V2_MODEL_RUNNER=0 chooses "
                "the V1 runner, where this plugin drafts"
            )
        return make(vllm_config, device, req_states)

    patching.replace(model_runner, "init_speculator", init_speculator)
