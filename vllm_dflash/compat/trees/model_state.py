# SPDX-License-Identifier: Apache-2.0
"""What the V2 runner asks of a model between its steps, for a target that verifies trees."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState

from vllm_dflash.compat.ownership import TreeShape
from vllm_dflash.compat.trees import FLAG
from vllm_dflash.compat.trees.attention import use_tree_attention
from vllm_dflash.compat.trees.sampler import TreeSampler
from vllm_dflash.compat.trees.store import TreeStore


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
        self.trees = TreeStore(self.max_num_reqs, shape, device)
        use_tree_attention(model, self.trees)
        self.positions = torch.zeros(self.max_num_tokens, dtype=torch.int64, device=device)
        self.all_as_chain = False

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """A request takes a row of the state."""
        super().add_request(req_index, new_req_data)
        self.trees.begin(req_index, self.all_as_chain or depends_on_path(new_req_data.sampling_params))

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, torch.Tensor | None]:
        """The positions of a step's rows, [rows after padding]."""
        self.trees.begin_step(
            input_batch.idx_mapping,
            input_batch.query_start_loc,
            input_batch.cu_num_logits,
            input_batch.num_draft_tokens_per_req,
        )
        positions = self.positions[: input_batch.num_tokens_after_padding]
        positions.copy_(input_batch.positions[: input_batch.num_tokens_after_padding])
        if self.trees.step is not None:
            local_rows = input_batch.expanded_local_pos
            depths = self.trees.row_depths(input_batch.expanded_idx_mapping, local_rows)
            positions[input_batch.logits_indices] += depths - local_rows
        return super().prepare_inputs(input_batch, req_states) | {"positions": positions}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """The same for made-up steps: graphs read the memory they were captured with."""
        return super().prepare_dummy_inputs(num_reqs, num_tokens) | {"positions": self.positions[:num_tokens]}

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
