# SPDX-License-Identifier: Apache-2.0
"""K/V caches whose rows go where the caller says: every sequence of a batch has its own length.

A token's slot is its position, so a sequence's K/V lie in slots 0, 1, ... whatever its neighbours do. Candidates are
written behind them, and those that are accepted are moved together. Nothing is ever removed: what lies behind a
sequence is invisible by the masks, and is written over.

Letters: B sequences, Q new rows, S slots, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class SlotPlan:
    """Where the next forward's rows go. Shared by all layers of a cache."""

    capacity: int  # slots of a sequence; the last one takes rows that nobody wants
    slots: torch.Tensor | None = None  # [B, Q] int64
    num_visible: int = 0  # S: attention gets this many slots
    rows: dict[int, torch.Tensor] = field(default_factory=dict)  # `memory_rows(slots)` by number of heads


class SlotCache(Cache):
    """What a model of Transformers takes for `past_key_values`. Memory is taken once, at the first forward."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.plan = SlotPlan(capacity)
        super().__init__(layers=[SlotLayer(self.plan) for _ in range(num_layers)])

    @property
    def spare_slot(self) -> int:
        """For padding rows: never visible."""
        return self.plan.capacity - 1

    def place(
        self,
        slots: torch.Tensor,  # [B, Q] int64
        num_visible: int,
    ) -> None:
        """Say where the next forward's rows go, and how many slots its attention sees."""
        assert num_visible < self.plan.capacity, f"{num_visible} slots of {self.plan.capacity}"
        self.plan.slots, self.plan.num_visible, self.plan.rows = slots, num_visible, {}

    def move(
        self,
        sources: torch.Tensor,  # [B, A] int64
        targets: torch.Tensor,  # [B, A] int64
    ) -> None:
        """Copy K/V between slots of the same sequence, in all layers. All are read before any is written."""
        rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer in self.layers:
            if layer.num_heads not in rows:
                rows[layer.num_heads] = (
                    memory_rows(sources, layer.num_heads, self.plan.capacity),
                    memory_rows(targets, layer.num_heads, self.plan.capacity),
                )
            layer.move(*rows[layer.num_heads])


class SlotLayer(CacheLayerMixin):
    """One layer's K/V, a row of memory for each head of each slot: [B*heads*capacity, D]."""

    def __init__(self, plan: SlotPlan) -> None:
        super().__init__()
        self.plan, self.num_heads = plan, 0

    def lazy_initialization(
        self,
        key_states: torch.Tensor,  # [B, heads, Q, D]
        value_states: torch.Tensor,  # [B, heads, Q, D]
    ) -> None:
        """Take the memory."""
        batch, self.num_heads = key_states.shape[:2]
        num_rows = batch * self.num_heads * self.plan.capacity
        # Zeros: a slot that was never written still takes part in products, with weight zero.
        self.keys, self.values = (states.new_zeros(num_rows, states.shape[3]) for states in (key_states, value_states))
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,  # [B, heads, Q, D]
        value_states: torch.Tensor,  # [B, heads, Q, D]
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new rows; returns keys and values of the visible slots, each [B, heads, S, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        plan = self.plan
        assert plan.slots is not None, "a forward before place()"
        if self.num_heads not in plan.rows:
            plan.rows[self.num_heads] = memory_rows(plan.slots, self.num_heads, plan.capacity)
        rows = plan.rows[self.num_heads]
        return self._write(self.keys, key_states, rows), self._write(self.values, value_states, rows)

    def _write(
        self,
        memory: torch.Tensor,  # [B*heads*capacity, D]
        states: torch.Tensor,  # [B, heads, Q, D]
        rows: torch.Tensor,  # [B*heads*Q]
    ) -> torch.Tensor:
        batch, heads, _, head_dim = states.shape
        memory.index_copy_(0, rows, states.reshape(-1, head_dim))
        return memory.view(batch, heads, self.plan.capacity, head_dim)[:, :, : self.plan.num_visible]

    def move(
        self,
        sources: torch.Tensor,  # [N] int64
        targets: torch.Tensor,  # [N] int64
    ) -> None:
        """Copy rows of memory."""
        for memory in (self.keys, self.values):
            assert memory is not None, "nothing to move before a forward"
            memory.index_copy_(0, targets, memory.index_select(0, sources))

    def get_seq_length(self) -> int:
        """Slots that attention sees; there is no one length of all sequences."""
        return self.plan.num_visible

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of visible slots, and where they begin."""
        return self.plan.num_visible, 0

    def get_max_length(self) -> int:
        """Slots of a sequence."""
        return self.plan.capacity


def memory_rows(
    slots: torch.Tensor,  # [B, N] int64
    num_heads: int,
    capacity: int,
) -> torch.Tensor:
    """Which rows of a layer's memory these slots are, head by head: [B*heads*N]."""
    starts = torch.arange(slots.shape[0] * num_heads, device=slots.device) * capacity
    return (starts.view(-1, num_heads, 1) + slots[:, None]).flatten()
