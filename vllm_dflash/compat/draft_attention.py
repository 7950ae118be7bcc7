# SPDX-License-Identifier: Apache-2.0
"""How vLLM grouped the draft layers' caches, and vLLM's attention metadata of the block rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig, UniformTypeKVCacheSpecs
from vllm.v1.worker.utils import AttentionGroup

from vllm_dflash.model_executor.draft_model import DFlashDraftModel
from vllm_dflash.proposer import BlockInputs

#: Builds one group's metadata: which of the builder's methods is right depends on the runner and on graph capture.
BuildOne = Callable[[AttentionGroup, CommonAttentionMetadata], Any]


class DraftAttention:
    """The draft layers by cache group, backend and causality: one metadata object serves each such group."""

    def __init__(
        self,
        model: DFlashDraftModel,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        device: torch.device,
        kernel_block_sizes: Sequence[int | None] | None,  # by KV-cache group
    ) -> None:
        layers = get_layers_from_vllm_config(vllm_config, Attention)
        names = [attention.attn.layer_name for attention in model.attentions]
        gid_of = {name: gid for gid, group in enumerate(kv_cache_config.kv_cache_groups) for name in group.layer_names}
        #: which of vLLM's KV-cache groups hold draft layers: G ids
        self.gids = sorted({gid_of[name] for name in names})
        #: L entries: index among `gids`
        self.group_of_layer = [self.gids.index(gid_of[name]) for name in names]
        #: G entries: slots in a block
        self.block_sizes = [kv_cache_config.kv_cache_groups[gid].kv_cache_spec.block_size for gid in self.gids]
        groups: dict[tuple[int, str, bool], AttentionGroup] = {}
        for name, attention in zip(names, model.attentions, strict=True):
            gid, backend = gid_of[name], layers[name].get_attn_backend()
            key = (gid, backend.full_cls_name(), attention.causal)
            if key not in groups:
                groups[key] = AttentionGroup(backend, [], _layer_spec(kv_cache_config, gid, name), gid)
            groups[key].layer_names.append(name)
        for (gid, _, _), group in groups.items():
            kernel_block_size = kernel_block_sizes[gid] if kernel_block_sizes is not None else None
            group.create_metadata_builders(vllm_config, device, kernel_block_size=kernel_block_size)
        self.groups = list(groups.values())
        self._keys = [(self.gids.index(gid), causal) for gid, _, causal in groups]

    def build(self, block: BlockInputs, build_one: BuildOne) -> dict[str, Any]:
        """Metadata of the block rows, by draft layer name."""
        num_reqs = block.seq_lens.shape[0]
        metadata: dict[str, Any] = {}
        for group, (index, causal) in zip(self.groups, self._keys, strict=True):
            common = CommonAttentionMetadata(
                query_start_loc=block.query_start_loc,
                query_start_loc_cpu=torch.arange(num_reqs + 1, dtype=torch.int32) * block.num_query_rows,
                seq_lens=block.seq_lens,
                num_reqs=num_reqs,
                num_actual_tokens=num_reqs * block.num_query_rows,
                max_query_len=block.num_query_rows,
                max_seq_len=block.max_seq_len,
                block_table_tensor=block.block_tables[index],
                slot_mapping=block.slot_mappings[index],
                causal=causal,
                seq_lens_cpu_upper_bound=block.seq_lens_upper_bound,
                positions=block.positions,
            )
            metadata |= dict.fromkeys(group.layer_names, build_one(group, common))
        return metadata


def _layer_spec(kv_cache_config: KVCacheConfig, gid: int, layer_name: str) -> Any:
    spec = kv_cache_config.kv_cache_groups[gid].kv_cache_spec
    return spec.kv_cache_specs[layer_name] if isinstance(spec, UniformTypeKVCacheSpecs) else spec
