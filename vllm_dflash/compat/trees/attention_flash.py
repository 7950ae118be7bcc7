# SPDX-License-Identifier: Apache-2.0
"""Attention over a prefix and a tree with FlashAttention, in CUDA graphs and outside of them.

A graph of decode steps holds verified rows only: its metadata is made for the prefixes (`TreeModelState.prepare_attn`),
and whose request has no candidates sees its own row as the prefix's last. In any other batch, requests with candidates
lead, and those behind them get a call of their own. There the host launches every layer, so what layers have in common
is made once a step, and no tensor is cut: FlashAttention finds the rows by where their requests start. In layers with a
sliding window each row has a window of its own, which FlashAttention does not know: a kernel of ours does all of it.

Letters: T rows of the step, R requests of a call.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_scheduler_metadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadata

from vllm_dflash.compat.trees.attention import add_trees
from vllm_dflash.compat.trees.store import TreeStep, TreeStore
from vllm_dflash.kernels.window_tree_attention import window_tree_attention


@dataclass(frozen=True)
class _Requests:
    """Some requests of a batch, for one call of FlashAttention."""

    query_start_loc: torch.Tensor  # [R+1] int32 among the T rows
    max_query_len: int
    seq_lens: torch.Tensor  # [R] int32 slots to see
    block_table: torch.Tensor  # [R, blocks]
    causal: bool  # whether a request's last row sees all of them, each before it one less; else all rows see all
    scheduler_metadata: torch.Tensor | None  # FlashAttention's plan


@dataclass(frozen=True)
class _Heads:
    """What a plan depends on, of a layer."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    block_size: int


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
        if self.sliding_window == (-1, -1):
            self._attend(query, key, value, kv_cache, attn_metadata, step, output)
            return output
        self._verify_in_windows(query, key, value, kv_cache, attn_metadata, step, output)
        if _has_others(step, attn_metadata):
            others = step.once(attn_metadata, _metadata_of_others)
            super().forward(layer, query, key, value, kv_cache, others, output)
        return output

    def _attend(
        self,
        query: torch.Tensor,  # [T, heads, D]
        key: torch.Tensor,  # [T, K/V heads, D]
        value: torch.Tensor,  # [T, K/V heads, D]
        kv_cache: torch.Tensor,  # [blocks, K/V heads, block size, 2*D]
        attn_metadata: FlashAttentionMetadata,
        step: TreeStep,
        output: torch.Tensor,  # [T, heads, D], written
    ) -> None:
        """The prefixes' part, the trees', and the requests behind them."""
        heads = _Heads(self.num_heads, self.num_kv_heads, self.head_size, query.dtype, kv_cache.shape[2])
        # [blocks, block size, K/V heads, D] each, as FlashAttention has it.
        views = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        keys, values = (canonicalize_singleton_dim_strides(view) for view in views)
        verifying = step.once(attn_metadata, _verifying, heads)
        lse = self._call(verifying, query, keys, values, attn_metadata, output)
        add_trees(self, self.trees, step, query, key, value, output, lse)
        if _has_others(step, attn_metadata):
            others = step.once(attn_metadata, _others, heads)
            self._call(others, query, keys, values, attn_metadata, output)

    def _call(
        self,
        requests: _Requests,
        query: torch.Tensor,  # [T, heads, D]
        keys: torch.Tensor,  # [blocks, block size, K/V heads, D]
        values: torch.Tensor,  # [blocks, block size, K/V heads, D]
        attn_metadata: FlashAttentionMetadata,
        output: torch.Tensor,  # [T, heads, D], written at the requests' rows
    ) -> torch.Tensor:
        """FlashAttention of some requests. Returns the log-sum-exp of their rows' scores, [heads, T]."""
        _, lse = flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            out=output,
            cu_seqlens_q=requests.query_start_loc,
            max_seqlen_q=requests.max_query_len,
            seqused_k=requests.seq_lens,
            max_seqlen_k=attn_metadata.max_seq_len,
            softmax_scale=self.scale,
            causal=requests.causal,
            block_table=requests.block_table,
            scheduler_metadata=requests.scheduler_metadata,
            num_splits=attn_metadata.max_num_splits,
            fa_version=self.vllm_flash_attn_version,
            s_aux=self.sinks,
            return_softmax_lse=True,
        )
        log_sum_exp: torch.Tensor = lse
        return log_sum_exp

    def _verify_in_windows(
        self,
        query: torch.Tensor,  # [T, heads, D]
        key: torch.Tensor,  # [T, K/V heads, D]
        value: torch.Tensor,  # [T, K/V heads, D]
        kv_cache: torch.Tensor,  # [blocks, K/V heads, block size, 2*D]
        attn_metadata: FlashAttentionMetadata,
        step: TreeStep,
        output: torch.Tensor,  # [T, heads, D], written
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


def _has_others(step: TreeStep, metadata: FlashAttentionMetadata) -> bool:
    """Whether requests follow those with candidates. A graph's requests all count as such."""
    return not step.is_whole and step.num_rows < metadata.num_actual_tokens


def _verifying(step: TreeStep, metadata: FlashAttentionMetadata, heads: _Heads) -> _Requests:
    """The prefixes of the requests with candidates."""
    num_reqs = step.num_reqs
    starts, prefix_lens = metadata.query_start_loc[: num_reqs + 1], step.rows.prefix_lens[:num_reqs]
    if step.is_whole:
        plan = metadata.scheduler_metadata
    else:
        plan = _plan(metadata, heads, starts, step.max_rows, prefix_lens, causal=False)
    return _Requests(starts, step.max_rows, prefix_lens, metadata.block_table[:num_reqs], False, plan)


def _others(step: TreeStep, metadata: FlashAttentionMetadata, heads: _Heads) -> _Requests:
    """Those behind them."""
    starts, lens = metadata.query_start_loc[step.num_reqs :], metadata.seq_lens[step.num_reqs :]
    plan = _plan(metadata, heads, starts, metadata.max_query_len, lens, causal=True)
    return _Requests(starts, metadata.max_query_len, lens, metadata.block_table[step.num_reqs :], True, plan)


def _metadata_of_others(step: TreeStep, metadata: FlashAttentionMetadata) -> FlashAttentionMetadata:
    """The same for vLLM's own call."""
    others = copy.copy(metadata)
    others.query_start_loc = metadata.query_start_loc[step.num_reqs :]
    others.seq_lens = metadata.seq_lens[step.num_reqs :]
    others.block_table = metadata.block_table[step.num_reqs :]
    others.scheduler_metadata = None
    return others


def _plan(
    metadata: FlashAttentionMetadata,
    heads: _Heads,
    query_start_loc: torch.Tensor,  # [R+1] int32
    max_query_len: int,
    seq_lens: torch.Tensor,  # [R] int32
    causal: bool,
) -> torch.Tensor | None:
    """FlashAttention's plan for some of a batch's requests, where vLLM has made one for the batch."""
    if metadata.scheduler_metadata is None:
        return None
    plan: torch.Tensor = get_scheduler_metadata(
        batch_size=len(seq_lens),
        max_seqlen_q=max_query_len,
        max_seqlen_k=metadata.max_seq_len,
        num_heads_q=heads.num_heads,
        num_heads_kv=heads.num_kv_heads,
        headdim=heads.head_size,
        cache_seqlens=seq_lens,
        qkv_dtype=heads.dtype,
        cu_seqlens_q=query_start_loc,
        page_size=heads.block_size,
        causal=causal,
        num_splits=metadata.max_num_splits,
    )
    return plan
