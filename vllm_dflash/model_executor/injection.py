# SPDX-License-Identifier: Apache-2.0
"""KV injection: context features -> K/V of all draft layers -> paged caches.

Where the caches have the layout that one of this package's kernels knows, norm, rotation and writing of all layers are
one launch; elsewhere, each layer's attention backend writes its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.model_executor.layers.attention import Attention

from vllm_dflash.kernels.context_kv import LayerCaches, inject_context_kv
from vllm_dflash.kernels.skinny_linear import MAX_SKINNY_ROWS, new_counters, skinny_linear, skinny_linear_normed
from vllm_dflash.model_executor.draft_model import DFlashDraftModel
from vllm_dflash.model_executor.fast_path import MAX_FAST_CONTEXT_ROWS
from vllm_dflash.model_executor.fp8_weights import weight_and_scale


class Injection:
    """Writes context rows into the caches of the draft layers."""

    def __init__(
        self,
        model: DFlashDraftModel,
        group_of_layer: Sequence[int],  # L entries: which of the G cache groups holds a layer
        fast: bool,  # few rows go through the kernels of fast_path.py
    ) -> None:
        self.model, self.group_of_layer = model, list(group_of_layer)
        self.layers = [attention.attn for attention in model.attentions]
        self._caches: LayerCaches | None = None
        # FP8 products of few rows are skinny_linear's in any case, and there they get the counters below.
        most_rows = MAX_SKINNY_ROWS if model.uses_fp8_weights else MAX_FAST_CONTEXT_ROWS
        self._max_fast_rows = most_rows if fast else 0
        # Of its own: it may run beside the block's products.
        self._counters = new_counters(model.context_kv.fc.weight.device) if fast else None

    def __call__(
        self,
        features: torch.Tensor,  # [T, F*H]
        positions: torch.Tensor,  # [T]
        slot_mappings: torch.Tensor,  # [G, T]; a negative slot writes nothing
    ) -> None:
        """Fuse, project, norm, rotate, write."""
        context_kv = self.model.context_kv
        if not context_kv.raw:
            k, v = context_kv(features, positions)
            write_by_layer(self.layers, k, v, [slot_mappings[group] for group in self.group_of_layer])
            return
        raw = self._project(features, positions)
        rotary_emb = self.model.attentions[0].rotary_emb
        inject_context_kv(
            raw,
            context_kv.k_norm_weight[:, 0],
            context_kv.eps,
            rotary_emb.cos_sin_cache,
            rotary_emb.is_neox_style,
            positions,
            slot_mappings,
            self._layer_caches(),
        )

    def _project(
        self,
        features: torch.Tensor,  # [T, F*H]
        positions: torch.Tensor,  # [T]
    ) -> torch.Tensor:
        """Raw projections [T, 2*L*heads*D]."""
        context_kv = self.model.context_kv
        if features.shape[0] > self._max_fast_rows:
            return context_kv(features, positions)
        weight, scale = weight_and_scale(context_kv.fc)
        norm_weight = context_kv.hidden_norm.weight
        _, normed = skinny_linear_normed(
            features, weight, norm_weight, context_kv.eps, weight_scale=scale, counters=self._counters
        )
        weight, scale = weight_and_scale(context_kv.kv_proj)
        return skinny_linear(normed, weight, weight_scale=scale, counters=self._counters)

    def _layer_caches(self) -> LayerCaches:
        """Looked up when first needed: vLLM allocates the caches after it has grouped them."""
        if self._caches is None:
            self._caches = LayerCaches.of(
                [layer.kv_cache for layer in self.layers],
                self.group_of_layer,
                [layer._k_scale for layer in self.layers],
                [layer._v_scale for layer in self.layers],
            )
        return self._caches


def write_by_layer(
    layers: Sequence[Attention],  # L layers
    k: torch.Tensor,  # [T, L, heads, D]
    v: torch.Tensor,  # [T, L, heads, D]
    slot_mappings: Sequence[torch.Tensor],  # L tensors [T]
) -> None:
    """Have every layer's attention backend write its rows."""
    for index, layer in enumerate(layers):
        layer.impl.do_kv_cache_update(layer, k[:, index], v[:, index], layer.kv_cache, slot_mappings[index])
