# SPDX-License-Identifier: Apache-2.0
"""The block forward: one pass over all query rows, attending to the injected context and to their own block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import set_forward_context

from vllm_dflash.model_executor.draft_model import DFlashDraftModel
from vllm_dflash.proposer.step import BlockInputs

#: From block inputs to vLLM's attention metadata, by draft layer name. Supplied by a runner's adapter.
AttentionMetadataBuilder = Callable[[BlockInputs], Mapping[str, Any]]


def denoise(
    model: DFlashDraftModel,
    block: BlockInputs,
    attn_metadata: Mapping[str, Any] | None,
    slot_mappings: Mapping[str, torch.Tensor],  # by draft layer name, each [R*Q]
    vllm_config: VllmConfig,
    num_tokens_across_dp: torch.Tensor | None = None,  # [data parallel size]
) -> torch.Tensor:
    """Hidden states of the query rows, [R*Q, H]. Without metadata (profiling), attention is skipped."""
    with set_forward_context(
        dict(attn_metadata) if attn_metadata is not None else None,
        vllm_config,
        num_tokens=block.input_ids.shape[0],
        num_tokens_across_dp=num_tokens_across_dp,
        cudagraph_runtime_mode=CUDAGraphMode.NONE,
        slot_mapping=dict(slot_mappings),
    ):
        return model(positions=block.positions, inputs_embeds=model.embed(block.input_ids))
