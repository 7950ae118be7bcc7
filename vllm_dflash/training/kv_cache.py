# SPDX-License-Identifier: Apache-2.0
"""A Transformers KV cache that writes into memory set aside once, where `DynamicCache` copies all of it every step."""

from __future__ import annotations

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """Keys and values [B, heads, n, D] are views of the first n of `capacity` positions."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.room: list[Tensor] = []

    def update(
        self,
        key_states: Tensor,  # [B, heads, new, D]
        value_states: Tensor,  # [B, heads, new, D]
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """Append; returns all keys and values so far. Raises ValueError past the capacity."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        end = held + key_states.shape[-2]
        if end > self.capacity:
            raise ValueError(f"KV cache for {self.capacity} positions asked to hold {end}")
        if not self.room or self.room[0].shape[0] != key_states.shape[0]:  # the first time, or rows have been dropped
            self._move(key_states, held)
        keys, values = self.room
        keys[:, :, held:end], values[:, :, held:end] = key_states, value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def _move(self, like: Tensor, held: int) -> None:
        batch, heads, _, head_dim = like.shape
        self.room = [like.new_empty(batch, heads, self.capacity, head_dim) for _ in range(2)]
        if held:
            self.room[0][:, :, :held], self.room[1][:, :, :held] = self.keys, self.values


def roomy_cache(num_layers: int, capacity: int) -> DynamicCache:
    """A cache of `num_layers` layers that holds at most `capacity` positions."""
    cache = DynamicCache()
    cache.layers = [RoomyLayer(capacity) for _ in range(num_layers)]
    return cache
