# SPDX-License-Identifier: Apache-2.0
"""KV injection: context states -> K/V of all draft layers -> paged caches (paper, section 3.1).

Every draft layer reads the target's features as keys and values of its own making. They enter the cache here, before
the block forward, so that the block's rows find them like any other cached context.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, ReplicatedLinear

from vllm_dflash.config import DFlashConfig


class ContextKV(nn.Module):
    """K/V of the context rows for all L draft layers at once: one GEMM, one norm, one rotation.

    The stacked projection is a copy of the layers' k/v rows, so that T rows cost one matrix product instead of L.
    A quantized drafter keeps its packed weights and projects layer by layer.
    """

    def __init__(self, config: DFlashConfig, projections: Sequence[QKVParallelLinear], rotary_emb: nn.Module) -> None:
        super().__init__()
        self.num_layers = config.num_hidden_layers
        self.num_kv_heads = projections[0].num_kv_heads
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        # Kept out of the module tree: these belong to the layers.
        self._shared = (tuple(projections), rotary_emb)
        rows = 2 * self.num_layers * self.num_kv_heads * self.head_dim
        self.kv_proj = (
            None
            if config.is_quantized
            else ReplicatedLinear(config.hidden_size, rows, bias=config.attention_bias, return_bias=False)
        )
        self.register_buffer("k_norm_weight", torch.ones(self.num_layers, 1, self.head_dim), persistent=False)

    @torch.no_grad()
    def gather_weights(self, k_norms: Sequence[nn.Module]) -> None:
        """Copy the layers' k/v projection rows and k_norm weights. Call once the checkpoint is loaded."""
        self.k_norm_weight.copy_(torch.stack([norm.weight for norm in k_norms])[:, None, :])
        if self.kv_proj is None:
            return
        for parameter in ("weight", "bias"):
            if getattr(self.kv_proj, parameter) is not None:
                qkv = [getattr(projection, parameter) for projection in self._shared[0]]
                getattr(self.kv_proj, parameter).copy_(torch.cat([self._k_rows(w) for w in qkv] + [
                    self._v_rows(w) for w in qkv
                ]))

    def _k_rows(
        self,
        qkv: torch.Tensor,  # [q + k + v rows, ...]
    ) -> torch.Tensor:
        size = self.num_kv_heads * self.head_dim
        return qkv[-2 * size : -size]

    def _v_rows(
        self,
        qkv: torch.Tensor,  # [q + k + v rows, ...]
    ) -> torch.Tensor:
        return qkv[-self.num_kv_heads * self.head_dim :]

    def _project(
        self,
        states: torch.Tensor,  # [T, H]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, each [T, L*heads*D], layer-major within a row."""
        if self.kv_proj is not None:
            return self.kv_proj(states).chunk(2, dim=-1)
        size = self.num_kv_heads * self.head_dim
        rows = [projection(states)[0] for projection in self._shared[0]]
        k = torch.cat([row[:, -2 * size : -size] for row in rows], dim=-1)
        return k, torch.cat([row[:, -size:] for row in rows], dim=-1)

    def forward(
        self,
        states: torch.Tensor,  # [T, H]
        positions: torch.Tensor,  # [T]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys, normed and rotated at `positions`, and values of every layer: each [T, L, heads, D]."""
        shape = (-1, self.num_layers, self.num_kv_heads, self.head_dim)
        k, v = self._project(states)
        k = self._norm(k.view(shape)).flatten(1)
        # All layers share one RoPE, so a row's heads of all layers turn together as if they were one layer's.
        k, _ = self._shared[1](positions, k, None)
        return k.view(shape), v.view(shape)

    def _norm(
        self,
        k: torch.Tensor,  # [T, L, heads, D]
    ) -> torch.Tensor:
        """Per-head RMSNorm with each layer's own weight.

        Written out because vLLM's CPU rms_norm applies layer 0's weight to every layer of a stacked [L, D] weight.
        """
        wide = k.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return wide.to(k.dtype) * self.k_norm_weight


def write_context_kv(
    layers: Sequence[Attention],  # L layers
    k: torch.Tensor,  # [T, L, heads, D]
    v: torch.Tensor,  # [T, L, heads, D]
    slot_mappings: Sequence[torch.Tensor],  # L tensors [T]; a negative slot writes nothing
) -> None:
    """Write every layer's rows into its paged cache."""
    for index, layer in enumerate(layers):
        layer.impl.do_kv_cache_update(layer, k[:, index], v[:, index], layer.kv_cache, slot_mappings[index])
