# SPDX-License-Identifier: Apache-2.0
"""After a verification the accepted rows move together, so that all that follows sees an ordinary accepted prefix.

Letters: R requests, D depths, T rows of the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from vllm_dflash.compat.trees.store import TreeStore


@dataclass(frozen=True)
class AcceptedRows:
    """Where the accepted rows are and where they belong. Of what is not accepted, root to root."""

    sources: torch.Tensor  # [R*D] of the step's rows
    targets: torch.Tensor  # [R*D]

    @classmethod
    def of(
        cls,
        trees: TreeStore,
        idx_mapping: torch.Tensor,  # [R]
        num_sampled: torch.Tensor,  # [R]
    ) -> AcceptedRows:
        """Of a step whose trees have been walked."""
        assert trees.step is not None
        way = trees.way[idx_mapping.long()]
        root = trees.step.first_rows.long()[:, None]
        depth = torch.arange(way.shape[1], device=way.device)
        is_accepted = depth < num_sampled[:, None] - 1
        return cls(
            torch.where(is_accepted, root + way, root).flatten(),
            torch.where(is_accepted, root + 1 + depth, root).flatten(),
        )

    def move_states(
        self,
        states: torch.Tensor,  # [>= T, H]
    ) -> torch.Tensor:
        """Hidden states of the rows with the accepted ones in their places, [>= T, H]."""
        return states.index_copy(0, self.targets, states[self.sources])

    def move_kv(
        self,
        caches: Iterable[tuple[str, torch.Tensor]],  # layer name, [blocks, K/V heads, block size, 2*D] by strides
        slot_mappings: Mapping[str, torch.Tensor],  # by layer name, [T]
    ) -> None:
        """Move K/V in the paged caches. All is read before anything is written."""
        for name, cache in caches:
            slots, block_size = slot_mappings[name], cache.shape[2]
            sources, targets = slots[self.sources], slots[self.targets]
            cache[targets // block_size, :, targets % block_size] = cache[
                sources // block_size, :, sources % block_size
            ]
