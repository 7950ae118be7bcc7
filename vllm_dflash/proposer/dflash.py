# SPDX-License-Identifier: Apache-2.0
"""The whole drafting step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from vllm.config import VllmConfig

from vllm_dflash.model_executor.context_kv import write_context_kv
from vllm_dflash.model_executor.draft_model import DFlashDraftModel
from vllm_dflash.proposer.block_inputs import block_inputs, context_rows
from vllm_dflash.proposer.denoise import AttentionMetadataBuilder, denoise
from vllm_dflash.proposer.sampling import greedy_drafts
from vllm_dflash.proposer.step import BlockInputs, ContextRows, Drafts, StepInputs


class DFlashProposer:
    """Drafts K tokens a request from what the target just computed.

    A runner's adapter makes one, tells it where the draft layers' caches are (`bind_caches`), and calls `propose`
    once a step.
    """

    def __init__(self, model: DFlashDraftModel, vllm_config: VllmConfig) -> None:
        self.model, self.config = model, model.config
        self.vllm_config = vllm_config
        self.layers = [attention.attn for attention in model.attentions]
        self._group_of_layer: list[int] = []
        self._block_sizes: tuple[int, ...] = ()
        self._build_metadata: AttentionMetadataBuilder | None = None

    def bind_caches(
        self,
        group_of_layer: Sequence[int],  # L entries: which of the G groups holds a layer
        block_sizes: Sequence[int],  # G entries: slots in a block
        build_metadata: AttentionMetadataBuilder,
    ) -> None:
        """Say how vLLM grouped the draft layers' caches, and how to build their attention metadata."""
        self._group_of_layer, self._block_sizes = list(group_of_layer), tuple(block_sizes)
        self._build_metadata = build_metadata

    def propose(
        self,
        step: StepInputs,
        num_speculative_tokens: int,
        num_tokens_across_dp: Callable[[int], torch.Tensor | None] = lambda num_tokens: None,
    ) -> Drafts:
        """One step: inject what the target computed, then draft a block behind it.

        With `num_speculative_tokens` = 0 the context is injected all the same, so that drafting can resume later.
        """
        self._inject(step.features, context_rows(step, self._block_sizes))
        if num_speculative_tokens == 0:
            return Drafts(step.anchors.new_empty((step.anchors.shape[0], 0), dtype=torch.int64))
        # Read at every step: vLLM may fit it to the cache after start-up.
        max_model_len = self.vllm_config.model_config.max_model_len
        block = block_inputs(step, self._block_sizes, num_speculative_tokens, self.config.mask_token_id, max_model_len)
        assert self._build_metadata is not None, "propose() before bind_caches()"
        hidden_states = denoise(
            self.model,
            block,
            self._build_metadata(block),
            self._by_layer_name(block.slot_mappings),
            self.vllm_config,
            num_tokens_across_dp(block.input_ids.shape[0]),
        )
        return greedy_drafts(self.model, hidden_states, block.num_query_rows)

    def profile(
        self,
        features: torch.Tensor,  # [T, F*H]
        positions: torch.Tensor,  # [T]
        block: BlockInputs,
        num_tokens_across_dp: torch.Tensor | None = None,
    ) -> None:
        """Run all the arithmetic of a step without touching a cache: for memory profiling and warm-up."""
        self.model.context_kv(features, positions)
        hidden_states = denoise(self.model, block, None, {}, self.vllm_config, num_tokens_across_dp)
        greedy_drafts(self.model, hidden_states, block.num_query_rows)

    def _inject(
        self,
        features: torch.Tensor,  # [T, F*H]
        rows: ContextRows,
    ) -> None:
        k, v = self.model.context_kv(features, rows.positions)
        write_context_kv(self.layers, k, v, [rows.slot_mappings[group] for group in self._group_of_layer])

    def _by_layer_name(self, slot_mappings: Sequence[torch.Tensor]) -> Mapping[str, Any]:
        """Slots of the query rows by draft layer name; one tensor [R*Q] a group."""
        return {
            layer.layer_name: slot_mappings[group]
            for layer, group in zip(self.layers, self._group_of_layer, strict=True)
        }
