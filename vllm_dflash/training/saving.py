# SPDX-License-Identifier: Apache-2.0
"""A drafter in the published layout."""

from __future__ import annotations

from pathlib import Path

import torch

from vllm_dflash.hf import DFlashDraftModel


def save_drafter(draft: DFlashDraftModel, output: Path) -> DFlashDraftModel:
    """Write config.json and bf16 weights to `output`; returns the bf16 copy that was written."""
    copy = DFlashDraftModel(draft.config).to(torch.bfloat16).eval()
    copy.load_state_dict(draft.state_dict())
    copy.save_pretrained(output)
    return copy
