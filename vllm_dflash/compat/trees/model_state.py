# SPDX-License-Identifier: Apache-2.0
"""What the V2 runner asks of a model between its steps, for a target that verifies trees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vllm_dflash.compat.metrics.fallbacks import Fallback
from vllm_dflash.compat.metrics.meter import StepMeter
from vllm_dflash.compat.ownership import TreeShape
from vllm_dflash.compat.trees import FLAG
from vllm_dflash.compat.trees.attention import use_tree_attention
from vllm_dflash.compat.trees.sampler import TreeSampler
from vllm_dflash.compat.trees.store import TreeStep, TreeStore


class TreeModelState(DefaultModelState):
    """vLLM's state with candidates at the positions of their depths, and a sampler that walks trees.

    A candidate's K/V slot is that of its row, as vLLM's scheduler has planned it; only its position, which RoPE reads,
    is that of the token it stands for.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
        shape: TreeShape,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        if self.rope_state is not None:
            raise ValueError(f"{FLAG}: {type(model).__name__} has positions of several axes (M-RoPE): leave it out")
        if vllm_config.compilation_config.cudagraph_mode == CUDAGraphMode.FULL:
            raise ValueError(
                f"{FLAG} does not go together with CUDA graphs of whole mixed batches: set --compilation-config's "
                '"cudagraph_mode" to "FULL_AND_PIECEWISE" or "FULL_DECODE_ONLY" instead of "FULL"'
            )
        self.trees = TreeStore(self.max_num_reqs, self.max_num_tokens, shape, device)
        use_tree_attention(model, self.trees)
        self.all_as_chain = False
        self.meter: StepMeter | None = None  # the adapter's, which comes with the caches

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """A request takes a row of the state."""
        super().add_request(req_index, new_req_data)
        by_sampling = depends_on_path(new_req_data.sampling_params)
        self.trees.begin(req_index, self.all_as_chain or by_sampling)
        if self.meter is not None and (self.all_as_chain or by_sampling):
            self.meter.count(Fallback.CHAIN_SAMPLING if by_sampling else Fallback.CHAIN_LOGITS_PROCESSOR)

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        **options: Any,
    ) -> dict[str, Any]:
        """Attention metadata; in a graph, of the prefixes that verified rows see."""
        self.trees.begin_step(input_batch, cudagraph_mode == CUDAGraphMode.FULL, for_capture)
        batch = (block_tables, slot_mappings, attn_groups, kv_cache_config)
        if self.trees.step is not None and self.trees.step.is_whole:
            return self._prepare_prefix_attn(input_batch, self.trees.step, *batch, for_capture)
        if self.trees.step is None and cudagraph_mode == CUDAGraphMode.FULL:
            input_batch = replace(input_batch, max_query_len=1)  # whatever was planned
        return super().prepare_attn(input_batch, cudagraph_mode, *batch, for_capture=for_capture, **options)

    def _prepare_prefix_attn(
        self,
        input_batch: InputBatch,
        step: TreeStep,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool,
    ) -> dict[str, Any]:
        """Metadata of a whole graph: rows see all of a prefix, whatever their order."""
        num_reqs, bounds = step.num_reqs, input_batch.seq_lens_cpu_upper_bound
        metadata: dict[str, Any] = build_attn_metadata(
            attn_groups=attn_groups,
            num_reqs=num_reqs,
            num_tokens=step.num_rows,
            query_start_loc_gpu=input_batch.query_start_loc[: num_reqs + 1],
            query_start_loc_cpu=torch.from_numpy(input_batch.query_start_loc_np[: num_reqs + 1]),
            max_query_len=step.max_rows,
            seq_lens=step.rows.prefix_lens,
            max_seq_len=self.max_model_len if for_capture else int(bounds[:num_reqs].max()),
            block_tables=block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            seq_lens_cpu_upper_bound=bounds,
            positions=input_batch.positions,
            is_prefilling=torch.from_numpy(input_batch.is_prefilling_np),
            for_cudagraph_capture=for_capture,
            causal=False,
            req_idx=input_batch.idx_mapping_np,
        )
        return metadata

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, torch.Tensor | None]:
        """The positions of a step's rows, [rows after padding]."""
        positions = self.trees.rows.positions[: input_batch.num_tokens_after_padding]
        return super().prepare_inputs(input_batch, req_states) | {"positions": positions}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """The same for made-up steps: graphs read the memory they were captured with."""
        return super().prepare_dummy_inputs(num_reqs, num_tokens) | {
            "positions": self.trees.rows.positions[:num_tokens]
        }

    def custom_sampler(self, sampler: Sampler) -> tuple[Sampler, TreeSampler]:
        """vLLM's sampler where nothing is verified, and ours where trees are."""
        # What a user's or a plugin's processor looks at is not known.
        self.all_as_chain = any(type(processor) not in _KNOWN_PROCESSORS for processor in sampler.logits_processors)
        speculative = self.vllm_config.speculative_config
        assert speculative is not None
        return sampler, TreeSampler(sampler, speculative, self.device, self.trees)


def check_target_state(vllm_config: VllmConfig, model: nn.Module) -> None:
    """Raise ValueError for a target that remembers its past otherwise than by K/V, or a way of running it."""
    found = resolve_model_state_cls(vllm_config, model)
    if found is not DefaultModelState:
        raise ValueError(f"{FLAG}: {type(model).__name__} keeps more than K/V of its past: leave it out")
    speculative, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    assert speculative is not None
    refused = {
        f'--speculative-config\'s "draft_sample_method" = "{speculative.draft_sample_method}"': (
            speculative.draft_sample_method != "greedy"
        ),
        f'--speculative-config\'s "rejection_sample_method" = "{speculative.rejection_sample_method}"': (
            speculative.rejection_sample_method != "standard"
        ),
        '--speculative-config\'s "enable_adaptive_verification"': speculative.enable_adaptive_verification,
        "--enable-batch-sharded-sampling": getattr(parallel, "enable_batch_sharded_sampling", False),
        "--return-sampling-mask": vllm_config.model_config.return_sampling_mask,
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "--enable-dbo": parallel.enable_dbo,
    }
    for flag, is_set in refused.items():
        if is_set:
            raise ValueError(f"{FLAG} does not go together with {flag}: leave one of them out")


def depends_on_path(params: SamplingParams | None) -> bool:
    """Whether the logits of a request depend on the tokens before them by more than the model.

    vLLM then takes the candidates for consecutive tokens. Its minimum of tokens, its allowed tokens and its bias look
    at a position or at none.
    """
    if params is None:
        return False
    penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty - 1.0)
    return bool(
        any(penalties)
        or params.bad_words
        or params.structured_outputs is not None
        or getattr(params, "thinking_token_budget", None) is not None
    )


#: Of vLLM's, in requests that `depends_on_path` tells.
_KNOWN_PROCESSORS = (LogitBiasState, PenaltiesState, BadWordsState)
