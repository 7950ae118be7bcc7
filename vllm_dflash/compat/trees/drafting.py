# SPDX-License-Identifier: Apache-2.0
"""The V2 adapter's part in draft trees: it drafts them, and has the accepted rows moved before it does.

Letters: R requests, T rows of the step, K depths, V vocabulary, N nodes, F tapped layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_dflash.compat.ownership import TreeShape
from vllm_dflash.compat.trees.compaction import AcceptedRows
from vllm_dflash.compat.trees.store import TreeStore
from vllm_dflash.proposer import Drafts
from vllm_dflash.proposer.trees import drafted_trees, empty_trees
from vllm_dflash.tree import DraftTree


class TreeDrafting:
    """Between a block's logits and the store that the next verification reads."""

    def __init__(self, shape: TreeShape, max_num_reqs: int, device: torch.device) -> None:
        self.shape = shape
        self.drafted = empty_trees(max_num_reqs, shape.num_nodes, device)  # in fixed memory, in the batch's order
        self.store: TreeStore | None = None  # profiling comes before there is one
        self.target_layers: Mapping[str, Any] = {}

    def bind(self, store: TreeStore, target_layers: Mapping[str, Any]) -> None:
        """Say where trees are kept, and which of the target's layers have K/V to move, by name."""
        self.store, self.target_layers = store, target_layers

    def compact(
        self,
        input_batch: InputBatch,
        slot_mappings: dict[str, torch.Tensor],  # by layer name, [T]
        aux_hidden_states: list[torch.Tensor],  # F tensors [>= T, H]
        num_sampled: torch.Tensor,  # [R]
    ) -> list[torch.Tensor]:
        """Make the accepted rows consecutive: K/V in the target's caches, and the hidden states returned."""
        if self.store is None or not input_batch.num_draft_tokens:
            return aux_hidden_states
        accepted = AcceptedRows.of(self.store, input_batch.idx_mapping, num_sampled)
        accepted.move_kv(((name, layer.kv_cache) for name, layer in self.target_layers.items()), slot_mappings)
        return [accepted.move_states(states) for states in aux_hidden_states]

    def draft(
        self,
        logits: torch.Tensor,  # [R, K, V]
        state_rows: torch.Tensor,  # [R]
        temperature: torch.Tensor,  # [rows of the state]
    ) -> Drafts:
        """The likeliest candidates of the block's distributions."""
        as_chain = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        if self.store is not None:
            as_chain = self.store.as_chain[state_rows]
        trees = drafted_trees(logits, temperature[state_rows], as_chain, self.shape.num_nodes)
        return Drafts(trees.token_ids, trees)

    def note(self, trees: DraftTree) -> None:
        """Keep a batch's trees where a graph can write them."""
        self.drafted.overwrite(trees)

    def hand_over(
        self,
        idx_mapping: torch.Tensor,  # [R]
    ) -> None:
        """The noted trees are what these requests verify next."""
        assert self.store is not None
        self.store.keep(idx_mapping, self.drafted.rows(len(idx_mapping)))
