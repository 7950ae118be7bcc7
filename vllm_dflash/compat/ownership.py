# SPDX-License-Identifier: Apache-2.0
"""Which engines are ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def drafts_here(vllm_config: VllmConfig) -> bool:
    """Whether this plugin drafts for an engine: method dflash, with a plain DFlash drafter.

    DFlash2, LiLiCorr, DSpark and drafters of other backbones carry other architecture names and stay with vLLM.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method != "dflash":
        return False
    return list(speculative.draft_model_config.hf_config.architectures or []) == ["DFlashDraftModel"]
