# SPDX-License-Identifier: Apache-2.0
"""Which engines are ours. Decided once, where the speculative config is made, and carried to vLLM's other processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig, VllmConfig

#: Set on the drafter's Hugging Face config, which travels with vLLM's configuration.
_MARK = "drafted_by_vllm_dflash"


def claim(speculative: SpeculativeConfig) -> None:
    """Mark an engine's speculative config: this plugin drafts for it."""
    setattr(speculative.draft_model_config.hf_config, _MARK, True)


def drafts_here(vllm_config: VllmConfig) -> bool:
    """Whether this plugin drafts for an engine."""
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method != "dflash":
        return False
    return getattr(speculative.draft_model_config.hf_config, _MARK, False) is True
