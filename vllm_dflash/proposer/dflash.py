# SPDX-License-Identifier: Apache-2.0
"""The whole drafting step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from vllm.config import VllmConfig

from vllm_dflash.kernels.rms_norm import divide_rows
from vllm_dflash.kernels.skinny_linear import MAX_SKINNY_ROWS
from vllm_dflash.model_executor.draft_model import DFlashDraftModel
from vllm_dflash.model_executor.fast_path import draft_block, likeliest_tokens, obstacle
from vllm_dflash.model_executor.injection import Injection
from vllm_dflash.proposer.block_inputs import block_inputs, context_rows
from vllm_dflash.proposer.denoise import AttentionMetadataBuilder, denoise
from vllm_dflash.proposer.sampling import Sampler, greedy_drafts
from vllm_dflash.proposer.side_branch import SideBranch
from vllm_dflash.proposer.step import BlockInputs, ContextRows, Drafts, StepInputs


class DFlashProposer:
    """Drafts K tokens a request from what the target just computed.

    A runner's adapter makes one and tells it where the draft layers' caches are (`bind_caches`). A runner whose batches
    have any shape calls `propose` once a step; one that replays CUDA graphs prepares the rows itself and captures
    `run`, which is all that follows.
    """

    def __init__(self, model: DFlashDraftModel, vllm_config: VllmConfig, sampler: Sampler = greedy_drafts) -> None:
        self.model, self.config = model, model.config
        self.vllm_config = vllm_config
        self.layers = [attention.attn for attention in model.attentions]
        self._sampler = sampler
        self.fast_path_obstacle = obstacle(model)
        self._group_of_layer: list[int] = []
        self._block_sizes: tuple[int, ...] = ()
        self._injection: Injection | None = None

    def bind_caches(
        self,
        group_of_layer: Sequence[int],  # L entries: which of the G groups holds a layer
        block_sizes: Sequence[int],  # G entries: slots in a block
    ) -> None:
        """Say how vLLM grouped the draft layers' caches."""
        self._group_of_layer, self._block_sizes = list(group_of_layer), tuple(block_sizes)
        is_fast = self.fast_path_obstacle is None
        self._injection = Injection(self.model, group_of_layer, fast=is_fast)
        if is_fast:
            self._context_branch = SideBranch(self.model.context_kv.fc.weight.device)

    def propose(
        self,
        step: StepInputs,
        num_speculative_tokens: int,
        build_metadata: AttentionMetadataBuilder,
        num_tokens_across_dp: Callable[[int], torch.Tensor | None] = lambda num_tokens: None,
    ) -> Drafts:
        """One step: inject what the target computed, then draft a block behind it.

        With `num_speculative_tokens` = 0 the context is injected all the same, so that drafting can resume later.
        """
        rows = context_rows(step, self._block_sizes)
        if num_speculative_tokens == 0:
            self.inject(step.features, rows)
            return no_drafts(step)
        # Read at every step: vLLM may fit it to the cache after start-up.
        max_model_len = self.vllm_config.model_config.max_model_len
        block = block_inputs(step, self._block_sizes, num_speculative_tokens, self.config.mask_token_id, max_model_len)
        num_rows = block.input_ids.shape[0]
        return self.run(step.features, rows, block, build_metadata(block), num_tokens_across_dp(num_rows))

    def run(
        self,
        features: torch.Tensor,  # [T, F*H]
        rows: ContextRows,
        block: BlockInputs,
        attn_metadata: Mapping[str, Any],
        num_tokens_across_dp: torch.Tensor | None = None,  # [data parallel size]
    ) -> Drafts:
        """All of a step's arithmetic: inject, denoise, sample. A CUDA graph of a decode step holds just this."""
        if not self._is_fast(block):
            self.inject(features, rows)
            return self.draft(block, attn_metadata, num_tokens_across_dp)
        # Nothing reads the context before the first attention, and neither side alone keeps the memory busy.
        self._context_branch.start(lambda: self.inject(features, rows))
        return self._draft_fast(block, attn_metadata, self._context_branch.join)

    def inject(
        self,
        features: torch.Tensor,  # [T, F*H]
        rows: ContextRows,
    ) -> None:
        """Context features -> K/V of all draft layers -> paged caches."""
        assert self._injection is not None, "a step before bind_caches()"
        self._injection(features, rows.positions, rows.slot_mappings)

    def draft(
        self,
        block: BlockInputs,
        attn_metadata: Mapping[str, Any] | None,  # None: profiling, attention is skipped
        num_tokens_across_dp: torch.Tensor | None = None,  # [data parallel size]
    ) -> Drafts:
        """One forward over the block rows, and the tokens it predicts."""
        if attn_metadata is not None and self._is_fast(block):
            return self._draft_fast(block, attn_metadata)
        slot_mappings = self._by_layer_name(block.slot_mappings) if attn_metadata is not None else {}
        hidden_states = denoise(self.model, block, attn_metadata, slot_mappings, self.vllm_config, num_tokens_across_dp)
        return self._sampler(self.model, hidden_states, block)

    def profile(
        self,
        features: torch.Tensor,  # [T, F*H]
        positions: torch.Tensor,  # [T]
        block: BlockInputs,
        num_tokens_across_dp: torch.Tensor | None = None,  # [data parallel size]
    ) -> Drafts:
        """Run all the arithmetic of a step without touching a cache: for memory profiling and warm-up."""
        self.model.context_kv(features, positions)
        return self.draft(block, None, num_tokens_across_dp)

    def _draft_fast(
        self,
        block: BlockInputs,
        attn_metadata: Mapping[str, Any],
        await_context: Callable[[], None] = lambda: None,
    ) -> Drafts:
        slots = [block.slot_mappings[group] for group in self._group_of_layer]
        rows = (block.input_ids, block.positions, slots)
        normed = draft_block(self.model, *rows, attn_metadata, await_context)
        if self._sampler is greedy_drafts:
            return Drafts(likeliest_tokens(self.model, normed, block.num_query_rows))
        return self._sampler(self.model, divide_rows(normed), block)

    def _is_fast(self, block: BlockInputs) -> bool:
        return self.fast_path_obstacle is None and block.input_ids.shape[0] <= MAX_SKINNY_ROWS

    def _by_layer_name(
        self,
        slot_mappings: Sequence[torch.Tensor],  # G tensors [R*Q]
    ) -> Mapping[str, torch.Tensor]:
        """Slots of the query rows by draft layer name."""
        return {
            layer.layer_name: slot_mappings[group]
            for layer, group in zip(self.layers, self._group_of_layer, strict=True)
        }


def no_drafts(step: StepInputs) -> Drafts:
    """Zero tokens for every request."""
    device, num_requests = step.seq_lens.device, step.query_start_loc.shape[0] - 1
    return Drafts(torch.empty((num_requests, 0), dtype=torch.int64, device=device))
