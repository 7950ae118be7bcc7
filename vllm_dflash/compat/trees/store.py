# SPDX-License-Identifier: Apache-2.0
"""The trees that requests are to verify, by row of the runner's state: drafted in one step, read in the next.

Letters: S rows of the state, R requests of a step, N nodes, D depths, W words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_dflash.compat.ownership import TreeShape
from vllm_dflash.proposer.trees import empty_trees
from vllm_dflash.tree import DraftTree, ancestor_mask, packed_mask


@dataclass(frozen=True)
class TreeStep:
    """What the target's attention needs of a step that verifies trees."""

    ancestor_words: torch.Tensor  # [R, 1+N, W] int32: which rows of a verification see which, a bit each
    depths: torch.Tensor  # [R, 1+N]; 0: the root
    first_rows: torch.Tensor  # [R] the roots among the step's rows
    num_rows: torch.Tensor  # [R] a root and its candidates, the first ones of N; 0: nothing is verified
    num_drafts: np.ndarray  # [R] on the host: candidates


class TreeStore:
    """Fixed memory for one tree a request, without its tokens: these are the runner's draft tokens."""

    def __init__(self, max_num_reqs: int, shape: TreeShape, device: torch.device) -> None:
        self.shape = shape
        nodes, rows = (max_num_reqs, shape.num_nodes), 1 + shape.num_nodes
        self.parents = torch.empty(nodes, dtype=torch.int64, device=device)  # [S, N]
        self.depths = torch.empty(nodes, dtype=torch.int64, device=device)  # [S, N]
        self.is_node = torch.empty(nodes, dtype=torch.bool, device=device)  # [S, N]
        # Which rows of a verification see which: [S, 1+N, 1+N].
        self.ancestors = torch.empty(max_num_reqs, rows, rows, dtype=torch.bool, device=device)
        # Which of the verified rows were accepted, the root's being 0: [S, D], anything behind the last one.
        self.way = torch.zeros(max_num_reqs, shape.num_depths, dtype=torch.int64, device=device)
        self.as_chain = torch.zeros(max_num_reqs, dtype=torch.bool, device=device)  # [S]
        self.step: TreeStep | None = None  # None: no request verifies anything
        self._no_tree = empty_trees(1, shape.num_nodes, device)
        self.keep(torch.arange(max_num_reqs, device=device), self._no_tree)

    def begin(self, state_index: int, as_chain: bool) -> None:
        """A request takes this row. What its earlier owner drafted is not its own."""
        self.keep(torch.full((1,), state_index, device=self.way.device), self._no_tree)
        self.as_chain[state_index] = as_chain

    def keep(
        self,
        idx_mapping: torch.Tensor,  # [R] state row of each request
        trees: DraftTree,  # of R requests, or one for all
    ) -> None:
        """These are verified next."""
        rows = idx_mapping.long()
        self.parents[rows], self.depths[rows], self.is_node[rows] = trees.parents, trees.depths, trees.is_node
        self.ancestors[rows] = ancestor_mask(trees, self.shape.num_depths)

    def read(
        self,
        idx_mapping: torch.Tensor,  # [R]
        token_ids: torch.Tensor,  # [R, N]
        is_scheduled: torch.Tensor,  # [R, N] bool
    ) -> DraftTree:
        """The trees of these requests. Their log-probabilities are not kept."""
        rows = idx_mapping.long()
        zeros = torch.zeros_like(token_ids, dtype=torch.float32)
        return DraftTree(token_ids, self.parents[rows], self.depths[rows], zeros, self.is_node[rows] & is_scheduled)

    def row_depths(
        self,
        state_rows: torch.Tensor,  # [L] state row of each verified row's request
        local_rows: torch.Tensor,  # [L] its place in the verification; 0: the root
    ) -> torch.Tensor:
        """How far behind the root each row's token is, [L]."""
        depths = self.depths[state_rows.long(), (local_rows - 1).clamp(min=0).long()]
        return torch.where(local_rows == 0, 0, depths)

    def begin_step(
        self,
        idx_mapping: torch.Tensor,  # [R]
        query_start_loc: torch.Tensor,  # [>= R+1]
        cu_num_logits: torch.Tensor,  # [R+1]
        num_drafts: np.ndarray | None,  # [R] on the host
    ) -> None:
        """Say what the next forward verifies. Of a request that verifies anything, these are its last rows."""
        if num_drafts is None or not num_drafts.any():
            self.step = None
            return
        num_logits = cu_num_logits.diff()
        rows = idx_mapping.long()
        depths = self.depths[rows]
        self.step = TreeStep(
            ancestor_words=packed_mask(self.ancestors[rows]),
            depths=torch.cat((torch.zeros_like(depths[:, :1]), depths), dim=1),
            first_rows=query_start_loc[1 : len(rows) + 1] - num_logits,
            num_rows=torch.where(num_logits > 1, num_logits, 0),
            num_drafts=num_drafts.copy(),
        )
