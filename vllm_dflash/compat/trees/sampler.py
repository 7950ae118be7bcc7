# SPDX-License-Identifier: Apache-2.0
"""The target's way through a tree.

The target's token is sampled after every row, with the noise that its request and its position would get without
speculation, and the way follows the children that say the same. So the text is token for token what it would have been:
no candidate is accepted because it was drafted.

Letters: L verified rows of all requests, R requests, N nodes, D depths, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.config import SpeculativeConfig
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_dflash.compat.trees.store import TreeStore
from vllm_dflash.kernels.tree_walk import walk_trees


class TreeSampler(RejectionSampler):
    """What the V2 runner takes for its rejection sampler: vLLM's, with a walk where that compares a chain."""

    def __init__(
        self, sampler: Sampler, speculative: SpeculativeConfig, device: torch.device, trees: TreeStore
    ) -> None:
        super().__init__(sampler, speculative, device)
        self.trees = trees
        self.enable_adaptive_verification = trees.shape.is_auto
        self._rows_by_output: torch.Tensor | None = None

    def _verify_in_chunks(
        self,
        logits: torch.Tensor,  # [L, V]
        input_batch: InputBatch,
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,  # [L] the token of each row
        pos: torch.Tensor,  # [L] slot position of each row
        *options: Any,
    ) -> Any:
        """vLLM's method over candidates that stand where their depth says."""
        pos = self.trees.rows.positions[input_batch.logits_indices]
        verified = super()._verify_in_chunks(logits, input_batch, draft_logits, draft_sampled, pos, *options)
        self.trees.forget_what_follows_prompts(input_batch)
        return verified

    def _verify(
        self,
        logits: torch.Tensor,  # [L, V]
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,  # [L] the token of each row
        pos: torch.Tensor,  # [L] each token's position
        cu_num_logits: torch.Tensor,  # [R+1]
        idx_mapping: torch.Tensor,  # [R]
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: torch.Tensor,  # [L]
        expanded_local_pos: torch.Tensor,  # [L]
        seq_lens_upper_bound_np: np.ndarray,
        verify_draft_sampled: torch.Tensor,  # [L] the same, -1 where a token must not be accepted
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Processed logits [L, V], sampled tokens [R, 1+N] and how many of them count [R]."""
        processed = self.sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        said = gumbel_sample(
            processed,
            expanded_idx_mapping,
            self.sampler.sampling_states.temperature.gpu,
            self.sampler.sampling_states.seeds.gpu,
            pos,
            apply_temperature=False,
            is_drafting=False,
            use_fp64=self.sampler.use_fp64_gumbel,
        )
        trees, seen = self.trees.trees, self.trees.seen
        sampled, num_sampled, self._rows_by_output = walk_trees(
            said,
            verify_draft_sampled,
            cu_num_logits,
            idx_mapping,
            trees.parents,
            trees.is_node,
            self.trees.way,
            seen.said,
            seen.num_said,
        )
        return processed, sampled, num_sampled

    def _get_logprobs_tensors(
        self,
        sampled: torch.Tensor,  # [R, 1+N]
        num_sampled: torch.Tensor,  # [R]
        logits: torch.Tensor,  # [L, V]
        cu_num_logits: torch.Tensor,  # [R+1]
        cu_num_logits_np: np.ndarray,
        max_num_logprobs: int,
    ) -> LogprobsTensors | None:
        """vLLM's, with the accepted rows' logits where a chain's would be."""
        if max_num_logprobs >= 0:
            assert self._rows_by_output is not None
            logits = logits[self._rows_by_output]
        return super()._get_logprobs_tensors(
            sampled, num_sampled, logits, cu_num_logits, cu_num_logits_np, max_num_logprobs
        )
