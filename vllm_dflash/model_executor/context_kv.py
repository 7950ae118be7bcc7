# SPDX-License-Identifier: Apache-2.0
"""Fusion and projection: target features -> K/V of all draft layers (paper, section 3.1).

Every draft layer reads the target's features as keys and values of its own making. `injection` puts them into the
paged caches before the block forward, so that the block's rows find them like any other cached context.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, ReplicatedLinear
from vllm.model_executor.models.utils import get_draft_quant_config

from vllm_dflash.config import DFlashConfig


@support_torch_compile(dynamic_arg_dims={"features": 0, "positions": 0})
class ContextKV(nn.Module):
    """K/V of the context rows for all L draft layers at once: one fusion, one GEMM, one norm, one rotation.

    The stacked projection is a copy of the layers' k/v rows, so that T rows cost one matrix product instead of L.
    A quantized drafter keeps its packed weights and projects layer by layer.

    With `raw`, norm and rotation are left to whoever writes the caches: forward returns the projections, all layers'
    keys beside all layers' values, [T, 2*L*heads*D].
    """

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        config: DFlashConfig,
        projections: Sequence[QKVParallelLinear],
        rotary_emb: nn.Module,
        raw: bool = False,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.raw = raw
        self.num_layers = config.num_hidden_layers
        self.num_kv_heads = projections[0].num_kv_heads
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        # In tuples, since these modules belong to the layers and must not be registered twice.
        self._projections = tuple(projections)
        self._rotary_emb = (rotary_emb,)
        self.fc = ReplicatedLinear(
            config.feature_width,
            config.hidden_size,
            bias=False,
            quant_config=get_draft_quant_config(vllm_config),
            prefix="fc",
            return_bias=False,
        )
        self.hidden_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
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
        for kind in ("weight", "bias"):
            stacked = getattr(self.kv_proj, kind)
            if stacked is not None:
                parts = [self._split_kv(getattr(projection, kind), dim=0) for projection in self._projections]
                stacked.copy_(torch.cat([k for k, _ in parts] + [v for _, v in parts]))

    def _split_kv(
        self,
        qkv: torch.Tensor,  # q, k and v rows along `dim`
        dim: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.num_kv_heads * self.head_dim
        _, k, v = qkv.split([qkv.shape[dim] - 2 * size, size, size], dim=dim)
        return k, v

    def _project(
        self,
        states: torch.Tensor,  # [T, H]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, each [T, L*heads*D], layer-major within a row."""
        if self.kv_proj is not None:
            k, v = self.kv_proj(states).chunk(2, dim=-1)
            return k, v
        parts = [self._split_kv(projection(states)[0], dim=1) for projection in self._projections]
        return torch.cat([k for k, _ in parts], dim=-1), torch.cat([v for _, v in parts], dim=-1)

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

    def forward(
        self,
        features: torch.Tensor,  # [T, F*H]
        positions: torch.Tensor,  # [T]
    ) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        """Keys, normed and rotated at `positions`, and values of every layer: each [T, L, heads, D]. Or raw."""
        states = self.hidden_norm(self.fc(features))  # [T, H], shared by all layers
        if self.raw and self.kv_proj is not None:
            return self.kv_proj(states)
        k, v = self._project(states)
        if self.raw:
            return torch.cat((k, v), dim=-1)
        shape = (-1, self.num_layers, self.num_kv_heads, self.head_dim)
        k = self._norm(k.reshape(shape)).flatten(1)
        # All layers share one RoPE, so a row's heads of all layers turn together as if they were one layer's.
        k, _ = self._rotary_emb[0](positions, k, None)
        return k.view(shape), v.reshape(shape)
