# SPDX-License-Identifier: Apache-2.0
"""The adapter to the V1 model runner (`vllm/v1/worker/gpu_model_runner.py`, which also serves the CPU build)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed.parallel_state import is_global_first_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import get_draft_load_config, initialize_model
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig, UniformTypeKVCacheSpecs
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.worker.utils import AttentionGroup

from vllm_dflash.config import DFlashConfig
from vllm_dflash.logs import logger
from vllm_dflash.model_executor.draft_model import DFlashDraftModel
from vllm_dflash.model_executor.target_features import check_target
from vllm_dflash.proposer import BlockInputs, DFlashProposer, StepInputs

#: Longer than any request: see `initialize_attn_backend`.
_NO_LIMIT = 1 << 60


class V1Adapter(SpecDecodeBaseProposer):
    """What the V1 runner takes for its drafter: translates its calls for `DFlashProposer` and back.

    vLLM's base class brings the padded-batch bookkeeping (`prepare_next_token_ids_padded`, `prepare_inputs_padded`),
    which keeps rejected rows in the batch so that the host need not know their number.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any) -> None:
        _refuse_unsupported(vllm_config)
        super().__init__(vllm_config, device, pass_hidden_states_to_model=True, runner=runner)
        self.runner = runner
        self.supports_mm_inputs = False  # the block's rows are text, whatever the context holds
        draft_config = self.draft_model_config
        self.dflash = DFlashConfig.from_pretrained(draft_config.model, draft_config.revision)
        self._group_keys: list[tuple[int, bool]] = []  # of draft_attn_groups: (index among our KV groups, causal)

    def _warn_if_multimodal(self) -> None:
        """Nothing to warn of."""

    def _create_draft_vllm_config(self) -> VllmConfig:
        base = super()._create_draft_vllm_config()
        non_causal = any(not layer.causal for layer in self.dflash.layers)
        architecture = base.model_config.model_arch_config
        if architecture.is_mm_prefix_lm:  # a trait of the target that rules out backends; the drafter reads text
            base.model_config.model_arch_config = replace(architecture, is_mm_prefix_lm=False)
        return replace(base, attention_config=replace(base.attention_config, use_non_causal=non_causal))

    def load_model(self, target_model: nn.Module) -> None:
        """Build and load the drafter, and say which of the target's layers to tap."""
        target = target_model.get_language_model() if hasattr(target_model, "get_language_model") else target_model
        check_target(target_model)
        # The runner taps the target next, and looks here first for the layers.
        self.draft_model_config.hf_config.eagle_aux_hidden_state_layer_ids = self.dflash.aux_hidden_state_layer_ids
        self.model = self._load_draft_model()
        self.model.share_with_target(target.embed_input_ids, target.lm_head)
        self.proposer = DFlashProposer(self.model, self.vllm_config)
        if is_global_first_rank():
            logger.info(
                "vllm_dflash: drafting with DFlashProposer (V1 runner), %d tokens a block of %d, drafter %s",
                self.num_speculative_tokens, self.dflash.block_size, self.dflash.source,
            )  # fmt: skip

    def _load_draft_model(self) -> DFlashDraftModel:
        vllm_config = self._create_draft_vllm_config()
        loader = get_model_loader(get_draft_load_config(vllm_config))

        def create_model(vllm_config: VllmConfig, model_config: Any, prefix: str = "") -> nn.Module:
            return initialize_model(vllm_config, prefix=prefix, model_class=DFlashDraftModel, model_config=model_config)

        # vLLM's registry would answer the checkpoint's architecture name with vLLM's own model.
        loader.create_model = create_model
        return loader.load_model(vllm_config, self.draft_model_config)

    def initialize_attn_backend(
        self, kv_cache_config: KVCacheConfig, kernel_block_sizes: list[int] | None = None
    ) -> None:
        """Learn which KV-cache groups hold the draft layers, and make their metadata builders.

        Layers are grouped by cache group, backend and causality: one metadata object serves each such group.
        """
        # The runner stops drafting for the WHOLE batch when one request nears the drafter's limit, and the others then
        # miss context they never get back. `block_inputs` masks out such rows request by request instead.
        self.runner.effective_drafter_max_model_len = _NO_LIMIT
        layers = get_layers_from_vllm_config(self.vllm_config, Attention)
        gid_of = {name: gid for gid, group in enumerate(kv_cache_config.kv_cache_groups) for name in group.layer_names}
        names = [layer.layer_name for layer in self.proposer.layers]
        self._gids = sorted({gid_of[name] for name in names})
        self.kv_cache_gid = self._gids[0]
        groups: dict[tuple[int, str, bool], AttentionGroup] = {}
        for name, attention in zip(names, self.model.attentions, strict=True):
            gid, backend = gid_of[name], layers[name].get_attn_backend()
            key = (gid, backend.full_cls_name(), attention.causal)
            if key not in groups:
                groups[key] = AttentionGroup(backend, [], _layer_spec(kv_cache_config, gid, name), gid)
            groups[key].layer_names.append(name)
        for (gid, _, _), group in groups.items():
            kernel_block_size = kernel_block_sizes[gid] if kernel_block_sizes is not None else None
            group.create_metadata_builders(self.vllm_config, self.device, kernel_block_size=kernel_block_size)
        self.draft_attn_groups = list(groups.values())
        self._group_keys = [(self._gids.index(gid), causal) for gid, _, causal in groups]
        self.proposer.bind_caches(
            [self._gids.index(gid_of[name]) for name in names],
            [kv_cache_config.kv_cache_groups[gid].kv_cache_spec.block_size for gid in self._gids],
            self._build_attention_metadata,
        )

    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,  # [T]
        target_positions: torch.Tensor,  # [T], or [3, T] with M-RoPE
        target_hidden_states: torch.Tensor,  # [T, F*H]
        next_token_ids: torch.Tensor,  # [R]
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: torch.Tensor | None = None,  # [R]
        slot_mappings: Any = None,
    ) -> torch.Tensor:
        """Draft tokens [R, K]. Called by the runner after sampling."""
        num_reqs = common_attn_metadata.batch_size()
        tables = self.runner.input_batch.block_table
        step = StepInputs(
            features=target_hidden_states,
            # With M-RoPE several rows share a position; the drafter and its cache count rows, as the runner's slots do.
            positions=target_positions
            if target_positions.ndim == 1
            else self.runner.positions[: len(target_hidden_states)],
            query_start_loc=common_attn_metadata.query_start_loc[: num_reqs + 1],
            seq_lens=common_attn_metadata.seq_lens,
            num_rejected=num_rejected_tokens_gpu,
            anchors=next_token_ids,
            block_tables=tuple(tables[gid].get_device_tensor(num_reqs) for gid in self._gids),
            max_seq_len=common_attn_metadata.max_seq_len,
            seq_lens_upper_bound=common_attn_metadata.seq_lens_cpu_upper_bound,
        )
        drafts = self.proposer.propose(step, num_speculative_tokens, self._num_tokens_across_dp)
        return drafts.token_ids

    def dummy_run(
        self,
        num_tokens: int,
        use_cudagraphs: bool = True,
        is_graph_capturing: bool = False,
        slot_mappings: Any = None,
    ) -> None:
        """A step's arithmetic on `num_tokens` made-up context rows: profiling, warm-up, idle data-parallel ranks."""
        num_query_rows = 1 + self.num_speculative_tokens
        num_reqs = max(1, min(num_tokens // num_query_rows, self.max_batch_size))
        width = len(self.dflash.target_layer_ids) * self.dflash.target_hidden_size
        features = torch.zeros(num_tokens, width, dtype=self.dtype, device=self.device)
        num_rows = num_reqs * num_query_rows
        zeros = torch.zeros(num_rows, dtype=torch.int64, device=self.device)
        block = BlockInputs(
            input_ids=zeros.int(),
            positions=zeros,
            slot_mappings=(),
            query_start_loc=torch.arange(num_reqs + 1, device=self.device) * num_query_rows,
            seq_lens=zeros[:num_reqs],
            num_query_rows=num_query_rows,
            block_tables=(),
            max_seq_len=num_query_rows,
        )
        positions = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        with torch.inference_mode():
            self.proposer.profile(features, positions, block, self._num_tokens_across_dp(num_rows))

    def _num_tokens_across_dp(self, num_tokens: int) -> torch.Tensor | None:
        """Row counts of all data-parallel ranks. A collective: every rank takes part in every step."""
        if self.vllm_config.parallel_config.data_parallel_size == 1:
            return None
        return self._determine_batch_execution_and_padding(num_tokens, use_cudagraphs=False)[2]

    def _build_attention_metadata(self, block: BlockInputs) -> dict[str, Any]:
        """vLLM's attention metadata of the block rows, by draft layer name."""
        num_reqs = block.seq_lens.shape[0]
        metadata: dict[str, Any] = {}
        for group, (index, causal) in zip(self.draft_attn_groups, self._group_keys, strict=True):
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
            )
            built = group.build_metadata_for_drafting(common_attn_metadata=common, draft_index=0)
            metadata |= dict.fromkeys(group.layer_names, built)
        return metadata


def _refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Options of vLLM's that the V1 adapter cannot honour. Raises ValueError naming the flag."""
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    for flag, size in (
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size),
        ("--decode-context-parallel-size", parallel.decode_context_parallel_size),
    ):
        if size > 1:
            raise ValueError(f"vllm_dflash does not draft with {flag} {size} on vLLM's V1 runner: set it to 1")
    if speculative.draft_sample_method != "greedy":
        raise ValueError(
            f'--speculative-config\'s "draft_sample_method" = {speculative.draft_sample_method!r} is not supported on '
            'vLLM\'s V1 runner: leave it at "greedy", which is lossless at every temperature'
        )


def _layer_spec(kv_cache_config: KVCacheConfig, gid: int, layer_name: str) -> Any:
    spec = kv_cache_config.kv_cache_groups[gid].kv_cache_spec
    return spec.kv_cache_specs[layer_name] if isinstance(spec, UniformTypeKVCacheSpecs) else spec
