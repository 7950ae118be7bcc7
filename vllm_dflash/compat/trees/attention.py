# SPDX-License-Identifier: Apache-2.0
"""Attention of a target's layers over a prefix and a tree: a candidate sees the prefix, its ancestors and itself.

On a CPU, vLLM's kernel knows no such mask, and packs its K/V by instruction set. So these layers lay out their K/V as
on a GPU, row by row, and attention is PyTorch's.

Letters: T rows of the step, R requests, Q rows of a request, S slots of one, N nodes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata

from vllm_dflash.compat.trees.store import TreeStep, TreeStore

_FLAG = '--additional-config\'s "dflash": "tree"'


def use_tree_attention(target: nn.Module, trees: TreeStore) -> None:
    """Let all of a target's layers verify trees. Raises ValueError for a layer that cannot."""
    layers = [(name, module) for name, module in target.named_modules() if isinstance(module, Attention)]
    for name, layer in layers:
        impl = layer.impl
        if type(impl) is not CPUAttentionBackendImpl:
            raise ValueError(f"{_FLAG} is not available with {type(impl).__name__}, which {name} uses: leave it out")
        without = {
            "sinks": impl.sinks is not None,
            "ALiBi": impl.alibi_slopes is not None,
            "a soft cap": bool(impl.logits_soft_cap),
            "a quantized KV cache": impl.is_fp8_kv_cache,
            "another layer's K/V": impl.kv_sharing_target_layer_name is not None,
        }
        found = [what for what, is_there in without.items() if is_there]
        if found:
            raise ValueError(f"{_FLAG} is not available with {' and '.join(found)}, which {name} has: leave it out")
        impl.__class__ = CPUTreeAttention
        impl.trees = trees


class CPUTreeAttention(CPUAttentionBackendImpl):
    """vLLM's CPU attention layer with a mask for each request."""

    trees: TreeStore

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
        starts, lengths = attn_metadata.query_start_loc.tolist(), attn_metadata.seq_lens.tolist()
        for index, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
            if end == start:
                continue
            keys, values = self._cached(kv_cache, attn_metadata.block_table[index], lengths[index])
            visible = visible_slots(end - start, lengths[index], self.trees.step, index, self.sliding_window)
            out = F.scaled_dot_product_attention(
                query[start:end].transpose(0, 1)[None],
                keys[None],
                values[None],
                attn_mask=visible,
                scale=self.scale,
                enable_gqa=True,
            )
            output[start:end].view(end - start, self.num_heads, -1).copy_(out[0].transpose(0, 1))
        return output

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
    num_rows: int,  # Q
    length: int,  # S, these rows included
    step: TreeStep | None,
    index: int,  # of the request
    sliding_window: int,  # positions that a row sees, itself included; < 0: all
) -> torch.Tensor:
    """Which slots the rows of a request see, [Q, S] bool."""
    slots = torch.arange(length)
    positions = slots.clone()
    visible = slots <= slots[length - num_rows :, None]
    num_drafts = 0 if step is None else int(step.num_drafts[index])
    if step is not None and num_drafts:
        candidates = slice(length - 1 - num_drafts, length)  # and the root before them
        visible[-1 - num_drafts :, candidates] = step.ancestors[index, : 1 + num_drafts, : 1 + num_drafts]
        positions[candidates] = positions[candidates.start] + step.depths[index, : 1 + num_drafts]
    if sliding_window >= 0:
        visible &= positions[length - num_rows :, None] - positions < sliding_window
    return visible
