# SPDX-License-Identifier: Apache-2.0
"""The target's way through a tree.

The target's token is sampled after every row, with the noise that its request and its position would get without
speculation, and the way follows the children that say the same. So the text is token for token what it would have been:
no candidate is accepted because it was drafted.

Letters: L verified rows of all requests, R requests, N nodes, D depths, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from vllm.config import SpeculativeConfig
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_dflash.compat.trees.store import TreeStore
from vllm_dflash.tree import walk


class TreeSampler(RejectionSampler):
    """What the V2 runner takes for its rejection sampler: vLLM's, with a walk where that compares a chain."""

    def __init__(
        self, sampler: Sampler, speculative: SpeculativeConfig, device: torch.device, trees: TreeStore
    ) -> None:
        super().__init__(sampler, speculative, device)
        self.trees = trees
        self._rows_by_output: torch.Tensor | None = None

    def _verify(
        self,
        logits: torch.Tensor,  # [L, V]
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,  # [L] the token of each row
        pos: torch.Tensor,  # [L] slot position of each row
        cu_num_logits: torch.Tensor,  # [R+1]
        idx_mapping: torch.Tensor,  # [R]
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: torch.Tensor,  # [L]
        expanded_local_pos: torch.Tensor,  # [L]
        seq_lens_upper_bound_np: np.ndarray,
        verify_draft_sampled: torch.Tensor,  # [L] the same, -1 where a token must not be accepted
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Processed logits [L, V], sampled tokens [R, 1+N] and how many of them count [R]."""
        depths = self.trees.row_depths(expanded_idx_mapping, expanded_local_pos)
        positions = pos - expanded_local_pos + depths
        processed = self.sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            positions,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        said = gumbel_sample(
            processed,
            expanded_idx_mapping,
            self.sampler.sampling_states.temperature.gpu,
            self.sampler.sampling_states.seeds.gpu,
            positions,
            apply_temperature=False,
            is_drafting=False,
            use_fp64=self.sampler.use_fp64_gumbel,
        )
        sampled, num_sampled = self._walk(said, verify_draft_sampled, cu_num_logits, idx_mapping)
        return processed, sampled, num_sampled

    def _walk(
        self,
        said: torch.Tensor,  # [L] the target's token after each row
        tokens: torch.Tensor,  # [L] each row's own
        cu_num_logits: torch.Tensor,  # [R+1]
        idx_mapping: torch.Tensor,  # [R]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_nodes, num_depths = self.trees.shape
        local_rows = torch.arange(1 + num_nodes, device=said.device)
        rows = (cu_num_logits[:-1, None] + local_rows).clamp(max=len(said) - 1)  # [R, 1+N]
        is_scheduled = local_rows < cu_num_logits.diff()[:, None]
        tokens = tokens[rows][:, 1:].long()
        tree = self.trees.read(idx_mapping, tokens, is_scheduled[:, 1:] & (tokens >= 0))
        walked = walk(tree, self.trees.ancestors[idx_mapping.long()], said[rows], num_depths)
        way = walked.nodes + 1
        self.trees.way[idx_mapping.long()] = way
        depth = torch.arange(num_depths + 1, device=said.device)
        accepted = tree.token_ids.gather(1, walked.nodes.clamp(min=0))
        is_next = depth == walked.num_accepted[:, None]
        padded = torch.cat((accepted, accepted[:, :1]), dim=1)
        sampled = tree.token_ids.new_zeros(len(idx_mapping), 1 + num_nodes)
        sampled[:, : num_depths + 1] = torch.where(is_next, walked.next_token_ids[:, None], padded)
        self._rows_by_output = self._output_rows(way, walked.num_accepted, cu_num_logits, len(said))
        return sampled, (walked.num_accepted + 1).int()

    def _output_rows(
        self,
        way: torch.Tensor,  # [R, D]
        num_accepted: torch.Tensor,  # [R]
        cu_num_logits: torch.Tensor,  # [R+1]
        num_rows: int,  # L
    ) -> torch.Tensor:
        """Which row's logits each output token was sampled from, where vLLM expects them: [L]."""
        start = cu_num_logits[:-1, None].long()
        depth = torch.arange(way.shape[1], device=way.device)
        is_real = depth < num_accepted[:, None]
        rows = torch.arange(num_rows, device=way.device)
        rows.scatter_(
            0,
            torch.where(is_real, start + 1 + depth, start).flatten(),
            torch.where(is_real, start + way, start).flatten(),
        )
        return rows

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
