# SPDX-License-Identifier: Apache-2.0
"""Attention over a prefix and a tree with FlashAttention, in CUDA graphs and outside of them.

A graph of decode steps holds verified rows only: its metadata is made for the prefixes (`TreeModelState.prepare_attn`),
and whose request has no candidates sees its own row as the prefix's last. In any other batch, requests with candidates
lead, and what follows them is vLLM's own call. In layers with a sliding window each row has a window of its own, which
FlashAttention does not know: a kernel of ours does all of it.

Letters: T rows of the step.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadata

from vllm_dflash.compat.trees.attention import add_trees
from vllm_dflash.compat.trees.store import TreeStep, TreeStore
from vllm_dflash.kernels.window_tree_attention import window_tree_attention


class FlashTreeAttention(FlashAttentionImpl):
    """vLLM's FlashAttention layer with a mask for each request."""

    trees: TreeStore

    @staticmethod
    def obstacles(impl: FlashAttentionImpl, num_depths: int) -> dict[str, bool]:
        """What else keeps a layer from this, by name."""
        return {
            f"FlashAttention {impl.vllm_flash_attn_version}": impl.vllm_flash_attn_version != 3,
            "a quantized KV cache": impl.kv_cache_dtype not in ("auto", "float16", "bfloat16"),
            "context parallelism": impl.dcp_world_size > 1,
        }

    def forward(
        self,
        layer: nn.Module,
        query: torch.Tensor,  # [T, heads, D]
        key: torch.Tensor,  # [T, K/V heads, D]
        value: torch.Tensor,  # [T, K/V heads, D]
        kv_cache: torch.Tensor,  # [blocks, K/V heads, block size, 2*D]
        attn_metadata: FlashAttentionMetadata,
        output: torch.Tensor,  # [T, heads, D]
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention over the cached rows."""
        step = self.trees.step
        if attn_metadata is None or step is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        assert output_scale is None and output_block_scale is None, "FlashAttention fuses no quantization"
        num_rows = attn_metadata.num_actual_tokens if step.is_whole else step.num_rows
        verified = (query[:num_rows], key, value, kv_cache, attn_metadata, step, output[:num_rows])
        if self.sliding_window == (-1, -1):
            self._verify(*verified)
        else:
            self._verify_in_windows(*verified)
        if num_rows < attn_metadata.num_actual_tokens:
            rest = step.once(attn_metadata, _of_others)
            others = (states[num_rows:] for states in (query, key, value))
            super().forward(layer, *others, kv_cache, rest, output[num_rows:])
        return output

    def _verify(
        self,
        query: torch.Tensor,  # [verified rows, heads, D]
        key: torch.Tensor,  # [T, K/V heads, D]
        value: torch.Tensor,  # [T, K/V heads, D]
        kv_cache: torch.Tensor,  # [blocks, K/V heads, block size, 2*D]
        attn_metadata: FlashAttentionMetadata,
        step: TreeStep,
        output: torch.Tensor,  # [verified rows, heads, D], written
    ) -> None:
        """The prefixes' part and the trees'."""
        # [blocks, block size, K/V heads, D] each, as FlashAttention has it.
        caches = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        keys, values = (canonicalize_singleton_dim_strides(cache) for cache in caches)
        starts, prefix_lens, block_table = step.once(attn_metadata, _of_verifying)
        _, lse = flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            out=output,
            cu_seqlens_q=starts,
            max_seqlen_q=min(attn_metadata.max_query_len, 1 + self.trees.shape.num_nodes),  # a prompt may be longer
            seqused_k=prefix_lens,
            max_seqlen_k=attn_metadata.max_seq_len,
            softmax_scale=self.scale,
            causal=False,
            block_table=block_table,
            scheduler_metadata=attn_metadata.scheduler_metadata if step.is_whole else None,
            num_splits=attn_metadata.max_num_splits,
            fa_version=self.vllm_flash_attn_version,
            s_aux=self.sinks,
            return_softmax_lse=True,
        )
        add_trees(self, self.trees, step, query, key, value, output, lse)

    def _verify_in_windows(
        self,
        query: torch.Tensor,  # [verified rows, heads, D]
        key: torch.Tensor,  # [T, K/V heads, D]
        value: torch.Tensor,  # [T, K/V heads, D]
        kv_cache: torch.Tensor,  # [blocks, K/V heads, block size, 2*D]
        attn_metadata: FlashAttentionMetadata,
        step: TreeStep,
        output: torch.Tensor,  # [verified rows, heads, D], written
    ) -> None:
        """Both parts at once, of rows that each have a window of their own."""
        window_tree_attention(
            output.view(len(output), self.num_heads, -1),
            query,
            key,
            value,
            kv_cache,
            attn_metadata.block_table,
            self.trees.trees.words,
            step.rows,
            step.num_reqs,
            self.scale,
            self.sliding_window[0] + 1,
            self.sinks,
            step.max_rows,
        )


def _of_verifying(step: TreeStep, metadata: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query starts, prefix lengths and block tables of the requests with candidates."""
    num_reqs = step.num_reqs
    return (
        metadata.query_start_loc[: num_reqs + 1],
        step.rows.prefix_lens[:num_reqs],
        metadata.block_table[:num_reqs],
    )


def _of_others(step: TreeStep, metadata: Any) -> Any:
    """The metadata of requests behind those with candidates."""
    others = copy.copy(metadata)
    others.num_actual_tokens -= step.num_rows
    others.query_start_loc = metadata.query_start_loc[step.num_reqs :] - step.num_rows
    others.seq_lens = metadata.seq_lens[step.num_reqs :]
    others.block_table = metadata.block_table[step.num_reqs :]
    others.slot_mapping = metadata.slot_mapping[step.num_rows :]
    others.scheduler_metadata = None
    return others
