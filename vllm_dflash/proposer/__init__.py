# SPDX-License-Identifier: Apache-2.0
"""The engine side: one drafting step, in the order data flows. Knows no runner."""

from vllm_dflash.proposer.dflash import DFlashProposer
from vllm_dflash.proposer.step import AnchorSource, BlockInputs, ContextRows, Drafts, StepInputs

__all__ = ["AnchorSource", "BlockInputs", "ContextRows", "DFlashProposer", "Drafts", "StepInputs"]
