# SPDX-License-Identifier: Apache-2.0
"""Attention of a target's layers over a prefix and a tree: a candidate sees the prefix, its ancestors and itself.

The prefix is the same for all rows of a verification. So the attention backend's own kernel does that part, as it would
for a text that does not look ahead at itself, and says how much it weighs: the log-sum-exp of its scores. One Triton
kernel adds the other part, that of the tree.

Letters: T rows of the step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionImpl

from vllm_dflash.compat.trees import FLAG
from vllm_dflash.compat.trees.store import TreeStep, TreeStore
from vllm_dflash.kernels.tree_attention import merge_tree_attention


def use_tree_attention(target: nn.Module, trees: TreeStore) -> None:
    """Let all of a target's layers verify trees. Raises ValueError for a layer that cannot."""
    for name, layer in target.named_modules():
        if not isinstance(layer, AttentionLayerBase):
            continue
        # Other layers (of chunks, of latents) have other metadata for the same implementations, or ones of their own.
        if type(layer) is not Attention:
            raise ValueError(f"{FLAG} is not available with {type(layer).__name__}, which {name} is: leave it out")
        impl = layer.impl
        with_trees = _with_trees(impl)
        if with_trees is None:
            raise ValueError(f"{FLAG} is not available with {type(impl).__name__}, which {name} uses: leave it out")
        obstacles = _common_obstacles(impl) | with_trees.obstacles(impl, trees.shape.num_depths)
        found = [what for what, is_there in obstacles.items() if is_there]
        if found:
            raise ValueError(f"{FLAG} is not available with {' and '.join(found)}, which {name} has: leave it out")
        impl.__class__ = with_trees
        impl.trees = trees


def _common_obstacles(impl: Any) -> dict[str, bool]:
    """What keeps a layer of any attention backend from verifying trees, by name."""
    return {
        "ALiBi": impl.alibi_slopes is not None,
        "a soft cap": bool(impl.logits_soft_cap),
        "another layer's K/V": impl.kv_sharing_target_layer_name is not None,
    }


def _with_trees(impl: AttentionImpl) -> Any:
    """The class that an attention backend's layers become, or None."""
    name = type(impl).__name__
    if name == "CPUAttentionBackendImpl":
        from vllm_dflash.compat.trees.attention_cpu import CPUTreeAttention

        return CPUTreeAttention
    if name == "FlashAttentionImpl":
        from vllm_dflash.compat.trees.attention_flash import FlashTreeAttention

        return FlashTreeAttention
    return None


def add_trees(
    impl: Any,  # of heads and a scale
    trees: TreeStore,
    step: TreeStep,
    query: torch.Tensor,  # [T, heads, D]
    key: torch.Tensor,  # [T, K/V heads, D]
    value: torch.Tensor,  # [T, K/V heads, D]
    output: torch.Tensor,  # [T, heads, D] in: attention over the prefix; out: over both
    prefix_lse: torch.Tensor,  # [heads, T] fp32
) -> None:
    """The trees' part of their rows' attention. Other rows are not touched."""
    merge_tree_attention(
        output.view(len(output), impl.num_heads, -1),
        prefix_lse,
        query,
        key,
        value,
        trees.trees.words,
        *step.of_verifying,
        impl.scale,
        step.max_rows,
        sinks=impl.sinks,
    )
