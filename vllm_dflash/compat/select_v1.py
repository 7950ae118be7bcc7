# SPDX-License-Identifier: Apache-2.0
"""The V1 model runner's choice of a proposer.

Patch: the name `DFlashProposer` in `vllm.v1.worker.gpu_model_runner`. Reason: the runner chooses its proposer by an
if-chain over class names. Added: this package's adapter for plain DFlash drafters; all others get vLLM's class.
Removable when vLLM has a registry of proposers.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_dflash.compat import patching
from vllm_dflash.compat.ownership import drafts_here

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig


def install(gpu_model_runner: ModuleType) -> None:
    """Patch `vllm.v1.worker.gpu_model_runner`."""
    chooser = _Choose("DFlashProposer", (), {"candidates": (gpu_model_runner.DFlashProposer,)})
    patching.replace(gpu_model_runner, "DFlashProposer", chooser)


class _Choose(type):
    """Makes one name stand for either proposer, in the runner's call and in its isinstance checks."""

    candidates: tuple[type, ...]  # vLLM's class first; ours once it was needed

    def __call__(cls, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> Any:
        if not drafts_here(vllm_config):
            return cls.candidates[0](vllm_config, device, runner)
        from vllm_dflash.compat.runner_v1 import V1Adapter

        cls.candidates = (cls.candidates[0], V1Adapter)
        return V1Adapter(vllm_config, device, runner)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.candidates)
