# SPDX-License-Identifier: Apache-2.0
"""DFlash on Transformers: the draft model and `spec_generate`. The readable statement of the algorithm."""

from vllm_dflash.hf.generation import SpecGenerateOutput
from vllm_dflash.hf.modeling import DFlashDraftModel
from vllm_dflash.hf.target_features import TargetFeatures

__all__ = ["DFlashDraftModel", "SpecGenerateOutput", "TargetFeatures"]
