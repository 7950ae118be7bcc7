# SPDX-License-Identifier: Apache-2.0
"""Attention over a prefix and a tree on a CPU.

vLLM's kernel knows no mask for each request, and packs its K/V by instruction set. So these layers lay out their K/V as
on a GPU, row by row, and attention to the prefix is PyTorch's. The rest is the same kernel as anywhere.

Letters: T rows of the step, R requests, Q rows of a request, S slots of one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata

from vllm_dflash.compat.trees.attention import add_trees
from vllm_dflash.compat.trees.store import TreeStore


class CPUTreeAttention(CPUAttentionBackendImpl):
    """vLLM's CPU attention layer with a mask for each request."""

    trees: TreeStore

    @staticmethod
    def obstacles(impl: CPUAttentionBackendImpl, num_depths: int) -> dict[str, bool]:
        """What else keeps a layer from this, by name."""
        return {
            "sinks": impl.sinks is not None,
            "a quantized KV cache": impl.is_fp8_kv_cache,
            # Then candidates would have to be hidden from each other by their distance.
            f"a window of {impl.sliding_window} rows": 0 <= impl.sliding_window <= num_depths,
        }

    def do_kv_cache_update(
        self,
        layer: nn.Module,
        key: torch.Tensor,  # [T, K/V heads, D]
        value: torch.Tensor,  # [T, K/V heads, D]
        kv_cache: torch.Tensor,  # [blocks, K/V heads, block size, 2*D]
        slot_mapping: torch.Tensor,  # [T]; negative: padding
    ) -> None:
        """Write the step's rows."""
        block_size, num_rows = kv_cache.shape[2], len(slot_mapping)
        rows = (slot_mapping >= 0).nonzero().flatten()
        slots = slot_mapping[rows]
        states = torch.cat((key[:num_rows], value[:num_rows]), dim=-1)[rows]
        kv_cache[slots // block_size, :, slots % block_size] = states

    def forward(
        self,
        layer: nn.Module,
        query: torch.Tensor,  # [T, heads, D]
        key: torch.Tensor,  # [T, K/V heads, D]
        value: torch.Tensor,  # [T, K/V heads, D]
        kv_cache: torch.Tensor,  # [blocks, K/V heads, block size, 2*D]
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,  # [T, heads, D]
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention over the cached rows, request by request."""
        if attn_metadata is None:  # warm-up
            return output
        step = self.trees.step
        lse = torch.full((self.num_heads, len(query)), float("-inf"))
        starts, lengths = attn_metadata.query_start_loc.tolist(), attn_metadata.seq_lens.tolist()
        verified = [0] * len(lengths) if step is None else step.rows.num_rows[: len(lengths)].tolist()
        for index, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
            length, root = lengths[index], end - verified[index]
            prefix = length - verified[index]
            keys, values = self._cached(kv_cache, attn_metadata.block_table[index], length)
            for rows in (slice(start, root), slice(root, end)):
                if rows.start == rows.stop:
                    continue
                positions = torch.arange(length - (end - start), prefix)
                if rows.start == root:
                    assert step is not None
                    positions = step.rows.positions[rows]
                visible = visible_slots(positions, prefix, self.sliding_window)
                self._attend(query, output, lse, rows, keys[:, :prefix], values[:, :prefix], visible)
        if step is not None:
            add_trees(self, self.trees, step, query, key, value, output, lse)
        return output

    def _attend(
        self,
        query: torch.Tensor,  # [T, heads, D]
        output: torch.Tensor,  # [T, heads, D]
        lse: torch.Tensor,  # [heads, T] fp32
        rows: slice,  # Q of the T
        keys: torch.Tensor,  # [K/V heads, S, D]
        values: torch.Tensor,  # [K/V heads, S, D]
        visible: torch.Tensor,  # [Q, S] bool
    ) -> None:
        """Some rows of one request over some of its slots: their output, and the log-sum-exp of their scores."""
        group = self.num_heads // self.num_kv_heads
        keys, values = keys.float().repeat_interleave(group, dim=0), values.float().repeat_interleave(group, dim=0)
        scores = query[rows].float().transpose(0, 1) @ keys.transpose(1, 2) * self.scale  # [heads, Q, S]
        scores = scores.masked_fill(~visible, float("-inf"))
        lse[:, rows] = scores.logsumexp(dim=-1)
        weights = (scores - lse[:, rows, None]).exp()
        out = (weights @ values).transpose(0, 1)
        output.view(len(query), self.num_heads, -1)[rows] = out.to(output.dtype)

    def _cached(
        self,
        kv_cache: torch.Tensor,  # [blocks, K/V heads, block size, 2*D]
        blocks: torch.Tensor,  # [blocks of the request]
        length: int,  # S
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One request's keys and values, each [K/V heads, S, D]."""
        block_size = kv_cache.shape[2]
        own = kv_cache[blocks[: -(-length // block_size)].long()]  # [blocks, heads, block size, 2*D]
        states: Any = own.transpose(0, 1).flatten(1, 2)[:, :length]
        keys, values = states.chunk(2, dim=-1)
        return keys, values


def visible_slots(
    positions: torch.Tensor,  # [Q] of the rows
    num_slots: int,  # S; a slot's position is its number
    sliding_window: int,  # positions that a row sees, itself included; < 0: all
) -> torch.Tensor:
    """Which slots of a text the rows see, [Q, S] bool: those up to themselves."""
    slots = torch.arange(num_slots)
    visible = slots <= positions[:, None]
    if sliding_window >= 0:
        visible &= positions[:, None] - slots < sliding_window
    return visible
