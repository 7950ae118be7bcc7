# SPDX-License-Identifier: Apache-2.0
"""The adapter to the V1 model runner (`vllm/v1/worker/gpu_model_runner.py`, which also serves the CPU build)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

from vllm_dflash.compat.draft_attention import DraftAttention
from vllm_dflash.compat.draft_loading import announce, load_draft_model
from vllm_dflash.compat.metrics.meter import StepMeter
from vllm_dflash.compat.metrics.report import StepReport
from vllm_dflash.compat.ownership import startup_fallbacks
from vllm_dflash.config import DFlashConfig
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
        super().__init__(vllm_config, device, pass_hidden_states_to_model=True, runner=runner)
        self.runner = runner
        self.supports_mm_inputs = False  # the block's rows are text, whatever the context holds
        draft_config = self.draft_model_config
        self.dflash = DFlashConfig.from_pretrained(draft_config.model, draft_config.revision)
        self.meter = StepMeter.on(device)
        for reason in startup_fallbacks(vllm_config):
            self.meter.count(reason)

    def _warn_if_multimodal(self) -> None:
        """Nothing to warn of."""

    def load_model(self, target_model: nn.Module) -> None:
        """Build and load the drafter."""
        check_target(target_model)
        self.model = load_draft_model(self.vllm_config, self.dflash, target_model)
        self.proposer = DFlashProposer(self.model, self.vllm_config)
        announce(self.dflash, "V1", self.num_speculative_tokens)

    def initialize_attn_backend(
        self, kv_cache_config: KVCacheConfig, kernel_block_sizes: list[int] | None = None
    ) -> None:
        """Learn which KV-cache groups hold the draft layers, and make their metadata builders."""
        # The runner stops drafting for the WHOLE batch when one request nears the drafter's limit, and the others then
        # miss context they never get back. `block_inputs` masks out such rows request by request instead.
        self.runner.effective_drafter_max_model_len = _NO_LIMIT
        attention = DraftAttention(self.model, self.vllm_config, kv_cache_config, self.device, kernel_block_sizes)
        self.attention = attention
        self.draft_attn_groups, self.kv_cache_gid = attention.groups, attention.gids[0]
        self.proposer.bind_caches(attention.group_of_layer, attention.block_sizes)

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
        self.meter.begin_draft()
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
            block_tables=tuple(tables[gid].get_device_tensor(num_reqs) for gid in self.attention.gids),
            max_seq_len=common_attn_metadata.max_seq_len,
            seq_lens_upper_bound=common_attn_metadata.seq_lens_cpu_upper_bound,
        )
        drafts = self.proposer.propose(
            step, num_speculative_tokens, self._build_attention_metadata, self._num_tokens_across_dp
        )
        self.meter.end_draft(has_drafted=num_speculative_tokens > 0)
        return drafts.token_ids

    def report(self) -> StepReport:
        """What the step's metrics are. Called by the runner after drafting."""
        return self.meter.report(budget=None, break_even=None)

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
        width = self.dflash.feature_width
        features = torch.zeros(num_tokens, width, dtype=self.dtype, device=self.device)
        block = BlockInputs.made_up(num_reqs, num_query_rows, self.device)
        positions = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        with torch.inference_mode():
            self.proposer.profile(features, positions, block, self._num_tokens_across_dp(num_reqs * num_query_rows))

    def _num_tokens_across_dp(self, num_tokens: int) -> torch.Tensor | None:
        """Row counts of all data-parallel ranks. A collective: every rank takes part in every step."""
        if self.vllm_config.parallel_config.data_parallel_size == 1:
            return None
        return self._determine_batch_execution_and_padding(num_tokens, use_cudagraphs=False)[2]

    def _build_attention_metadata(self, block: BlockInputs) -> dict[str, Any]:
        return self.attention.build(block, lambda group, common: group.build_metadata_for_drafting(common, 0))
