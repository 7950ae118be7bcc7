# SPDX-License-Identifier: Apache-2.0
"""Attention with a mask and grouped heads that copies no K/V.

PyTorch's fast kernels take a mask, or fewer K/V heads than query heads, but not both, so Transformers copies every K/V
head once for each query head of its group, in every layer and round. Here the heads of a group become more rows of one
head instead.

Letters: B sequences, Q rows, S slots, D head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

#: Of more rows, as a prompt has, the mask is what takes memory, and K/V heads are copied instead.
FEW_ROWS = 512

NAME = "grouped_heads"  # Transformers takes any name with "flash" in it for a FlashAttention package


def grouped_attention(
    query: torch.Tensor,  # [B, heads, Q, D]
    key: torch.Tensor,  # [B, K/V heads, S, D]
    value: torch.Tensor,  # [B, K/V heads, S, E]; E = D but for latent attention
    mask: torch.Tensor | None,  # [B, 1, Q or 1, S], additive or bool; None: all see all
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention, [B, heads, Q, E]."""
    batch, num_heads, num_rows, head_dim = query.shape
    group = num_heads // key.shape[1]
    if num_rows > FEW_ROWS:
        key, value = (heads.repeat_interleave(group, dim=1) for heads in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    if mask is not None and mask.shape[2] > 1:
        mask = mask.repeat(1, 1, group, 1)  # [B, 1, group * Q, S]
    rows = query.reshape(batch, key.shape[1], group * num_rows, head_dim)
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return out.reshape(batch, num_heads, num_rows, value.shape[3])


def _for_transformers(
    module: nn.Module,
    query: torch.Tensor,  # [B, heads, Q, D]
    key: torch.Tensor,  # [B, K/V heads, S, D]
    value: torch.Tensor,  # [B, K/V heads, S, D]
    attention_mask: torch.Tensor | None,  # [B, 1, Q, S]
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What a decoder layer calls: [B, Q, heads, D], and no weights."""
    out = grouped_attention(query, key, value, attention_mask, scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _for_transformers)


@contextlib.contextmanager
def grouped_heads(target: nn.Module) -> Iterator[None]:
    """While active, a target that uses `sdpa` uses this. Others (`eager`, with sinks or soft caps) keep their own."""
    config = target.config.get_text_config(decoder=True)
    if config._attn_implementation != "sdpa":
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
