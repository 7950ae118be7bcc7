# SPDX-License-Identifier: Apache-2.0
"""The block forward for few rows, at the speed its weights can be read: six launches a draft layer.

A block of one request has 16 rows: its forward costs what its weights cost to read, and every launch beside the matrix
products leaves the memory idle. So norms, SwiGLU and residuals ride on the products, norm, rotation and cache write of
the attention's inputs are one launch, and where only likeliest tokens count, logits are reduced to their maximum where
they are computed. The arithmetic is that of draft_model.py's modules, for plain drafters on one GPU; the rest goes
through those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_dflash.kernels.lm_head import argmax_linear
from vllm_dflash.kernels.qkv import norm_rope_cache
from vllm_dflash.kernels.rms_norm import Normed, norm_rows
from vllm_dflash.kernels.skinny_linear import skinny_linear, skinny_linear_normed
from vllm_dflash.model_executor.caches import CACHE_LAYOUT_BACKENDS
from vllm_dflash.model_executor.fp8_weights import Fp8RowsMethod, weight_and_scale

if TYPE_CHECKING:
    from vllm_dflash.model_executor.draft_model import DFlashAttention, DFlashDraftModel

#: Context rows up to here go the fast way; their two products are cuBLAS's strong shapes, so that this is earlier.
MAX_FAST_CONTEXT_ROWS = 16


def obstacle(model: DFlashDraftModel) -> str | None:
    """What keeps a draft model from this path, or None. Known once the weights are loaded."""
    attention = model.attentions[0]
    linears = [*_linears(model), model.context_kv.fc]
    rotary = type(attention.rotary_emb)
    checks = {
        "no Hopper GPU or later": not _is_hopper(attention.q_norm.weight.device),
        "tensor parallelism": get_tensor_model_parallel_world_size() > 1,
        "a quantized drafter": not all(_is_plain(linear) for linear in linears),
        "biases": any(linear.bias is not None for linear in linears),
        f"activation {model.config.hidden_act}": model.config.hidden_act != "silu",
        f"rotary embedding {rotary.__name__}": rotary.forward_cuda is not RotaryEmbedding.forward_cuda,
        "a KV cache of another type": attention.attn.kv_cache_dtype not in ("auto", "bfloat16", "float16"),
        "the LM head's layout": not _is_plain_head(model.lm_head),
        "the attention backend": attention.attn.attn_backend.get_name() not in CACHE_LAYOUT_BACKENDS,
    }
    return next((reason for reason, applies in checks.items() if applies), None)


def draft_block(
    model: DFlashDraftModel,
    input_ids: torch.Tensor,  # [R*Q]
    positions: torch.Tensor,  # [R*Q]
    slot_mappings: Sequence[torch.Tensor],  # L tensors [R*Q]
    attn_metadata: Mapping[str, Any],
    await_context: Callable[[], None],  # called before the first attention
) -> Normed:
    """The hidden states of the block's rows [R*Q, H], on their way through the last norm."""
    eps, layers = model.config.rms_norm_eps, model.backbone.layers
    states = model.embed(input_ids)  # [R*Q, H], the residual stream
    normed = norm_rows(states, layers[0].input_layernorm.weight, eps)
    next_norms = [layer.input_layernorm for layer in layers[1:]] + [model.backbone.norm]
    for layer, slots, next_norm in zip(layers, slot_mappings, next_norms, strict=True):
        qkv = _linear(normed, layer.self_attn.qkv_proj)
        if layer is layers[0]:
            await_context()
        heads = _attend(layer.self_attn, qkv, positions, slots, attn_metadata, eps)
        states, normed = _linear_normed(heads, layer.self_attn.o_proj, states, layer.post_attention_layernorm, eps)
        activated = _linear(normed, layer.mlp.gate_up_proj, silu_and_mul=True)
        states, normed = _linear_normed(activated, layer.mlp.down_proj, states, next_norm, eps)
    return normed


def likeliest_tokens(
    model: DFlashDraftModel,
    normed: Normed,  # [R*Q, H]
    num_query_rows: int,
) -> torch.Tensor:
    """Of each mask row, [R, K]."""
    weight, scale = weight_and_scale(model.lm_head)
    tokens = argmax_linear(
        normed.rows,
        weight[: model.logits_processor.org_vocab_size],
        weight_scale=scale,
        row_ids=model.draft_id_to_target_id,
        num_query_rows=num_query_rows,
    )
    return tokens.view(-1, num_query_rows - 1)


def _attend(
    attention: DFlashAttention,
    qkv: torch.Tensor,  # [R*Q, (heads + 2 * KV heads) * D]
    positions: torch.Tensor,  # [R*Q]
    slots: torch.Tensor,  # [R*Q]
    attn_metadata: Mapping[str, Any],
    eps: float,
) -> torch.Tensor:
    """Attention over the cached context and the block, [R*Q, heads * D]."""
    layer, rotary = attention.attn, attention.rotary_emb
    query = norm_rope_cache(
        qkv,
        attention.q_norm.weight,
        attention.k_norm.weight,
        eps,
        rotary.cos_sin_cache,
        positions,
        slots,
        layer.kv_cache,
        is_neox_style=rotary.is_neox_style,
    )
    output = torch.empty_like(query)
    # Keys and values are in the cache already; the backends look at nothing else of them.
    unread = query[:, : attention.num_kv_heads]
    layer.impl.forward(layer, query, unread, unread, layer.kv_cache, attn_metadata[layer.layer_name], output=output)
    return output.flatten(1)


def _linear(
    x: torch.Tensor | Normed,  # [M, K]
    linear: nn.Module,
    silu_and_mul: bool = False,
) -> torch.Tensor:
    """[M, N] or, with `silu_and_mul`, [M, N/2]."""
    weight, scale = weight_and_scale(linear)
    return skinny_linear(x, weight, weight_scale=scale, silu_and_mul=silu_and_mul)


def _linear_normed(
    x: torch.Tensor,  # [M, K]
    linear: nn.Module,
    residual: torch.Tensor,  # [M, H]
    norm: nn.Module,
    eps: float,
) -> tuple[torch.Tensor, Normed]:
    """The residual stream after this layer, [M, H], and on its way through the norm that follows."""
    weight, scale = weight_and_scale(linear)
    return skinny_linear_normed(x, weight, norm.weight, eps, weight_scale=scale, residual=residual)


def _linears(model: DFlashDraftModel) -> list[nn.Module]:
    layers = model.backbone.layers
    return [
        linear
        for layer in layers
        for linear in (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
    ]


def _is_plain(linear: nn.Module) -> bool:
    return type(linear.quant_method) in (UnquantizedLinearMethod, Fp8RowsMethod)


def _is_plain_head(head: nn.Module | None) -> bool:
    if head is None or getattr(head, "bias", None) is not None:
        return False
    return isinstance(head.quant_method, UnquantizedEmbeddingMethod | Fp8RowsMethod)


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9
