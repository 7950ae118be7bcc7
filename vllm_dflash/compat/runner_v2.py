# SPDX-License-Identifier: Apache-2.0
"""The adapter to the V2 model runner (`vllm/v1/worker/gpu/model_runner.py`).

A decode step of the drafter is one CUDA graph: the adapter writes the step's rows into fixed memory and replays it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, get_kv_cache_spec_sliding_window
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.dp_utils import DPSyncState, dispatch_cg_and_sync_dp
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.utils import AttentionGroup

from vllm_dflash.compat.capture_sizes import most_requests
from vllm_dflash.compat.draft_attention import DraftAttention
from vllm_dflash.compat.draft_graphs import DraftGraphs
from vllm_dflash.compat.draft_loading import announce, load_draft_model
from vllm_dflash.compat.metrics.fallbacks import Fallback
from vllm_dflash.compat.metrics.meter import StepMeter
from vllm_dflash.compat.metrics.report import BudgetInForce, StepReport
from vllm_dflash.compat.ownership import draft_tree, startup_fallbacks
from vllm_dflash.compat.trees.budget import TreeBudget
from vllm_dflash.compat.trees.drafting import TreeDrafting
from vllm_dflash.config import DFlashConfig
from vllm_dflash.logs import logger
from vllm_dflash.model_executor.draft_model import DFlashDraftModel
from vllm_dflash.model_executor.target_features import check_target
from vllm_dflash.proposer import AnchorSource, BlockInputs, DFlashProposer, Drafts, StepInputs
from vllm_dflash.proposer.backlog import ContextBacklog
from vllm_dflash.proposer.sampling import Sampler, greedy_drafts, mask_rows
from vllm_dflash.proposer.staging import StagedStep, StagingLimits
from vllm_dflash.proposer.tapped_states import TappedStates


class V2Adapter(DraftModelSpeculator):
    """What the V2 runner takes for its speculator: translates its calls for `DFlashProposer` and back."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        draft_config = self.draft_model_config
        self.dflash = DFlashConfig.from_pretrained(draft_config.model, draft_config.revision)
        self.meter = StepMeter.on(device)
        for reason in startup_fallbacks(vllm_config):
            self.meter.count(reason)
        shape = draft_tree(vllm_config)
        self.trees = TreeDrafting(shape, self.max_num_reqs, self.max_num_tokens, device) if shape else None
        self.budget: TreeBudget | None = None
        if shape and shape.is_auto:
            self.budget = TreeBudget(self.max_num_reqs, shape.num_nodes, device, self.meter)
            self.enable_adaptive_verification: Any = self.budget  # what the runner takes it from
        # Also the rows that are read of a verification: of a tree, a way down.
        self.num_query_per_req = 1 + (shape.num_depths if shape else self.num_speculative_steps)
        self.most_blocks = most_requests(vllm_config.scheduler_config, self.num_query_per_req)
        self.graphs: DraftGraphs | None = None
        self.features: torch.Tensor | None = None  # [context rows of the largest graph, F*H]
        self.backlog: ContextBacklog | None = None  # where steps may do without drafts

    # Start-up, in the order the runner calls.

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> DFlashDraftModel:
        """Build and load the drafter."""
        check_target(target_model)
        model = load_draft_model(self.vllm_config, self.dflash, target_model)
        self.proposer = DFlashProposer(model, self.vllm_config, self._sampler())
        announce(self.dflash, "V2", self.num_query_per_req - 1, self.trees.shape if self.trees else None)
        self.target_attn_layer_names = sorted(target_attn_layer_names)
        return model

    def set_attn(
        self,
        model_state: Any,
        kv_cache_config: KVCacheConfig,
        block_tables: BlockTables,
        target_input_buffers: InputBuffers,
        target_attn_groups: list[list[AttentionGroup]],
    ) -> None:
        """Learn which KV-cache groups hold the draft layers, and make their metadata builders."""
        super().set_attn(model_state, kv_cache_config, block_tables, target_input_buffers, target_attn_groups)
        if self.trees:
            model_state.meter = self.meter
            layers = self.vllm_config.compilation_config.static_forward_context
            self.trees.bind(model_state.trees, {name: layers[name] for name in self.target_attn_layer_names})
        if self.budget:
            # On a CPU nothing runs beside the host's work.
            overlaps = bool(self.vllm_config.scheduler_config.async_scheduling) and self.device.type != "cpu"
            self.budget.bind(model_state.trees, model_state.model, self.dtype, self.max_model_len, overlaps)
        kernel_block_sizes = [groups[0].kernel_block_size if groups else None for groups in self.attn_groups]
        attention = DraftAttention(self.model, self.vllm_config, kv_cache_config, self.device, kernel_block_sizes)
        # The runner reads its speculator's groups by KV-cache group.
        self.attn_groups: list[list[AttentionGroup]] = [
            [group for group in attention.groups if group.kv_cache_group_id == gid]
            for gid in range(len(kv_cache_config.kv_cache_groups))
        ]
        _schedule_windows_at_run_time(attention.groups)
        self._configure_decode_metadata_update()
        self.attention = attention
        self.proposer.bind_caches(attention.group_of_layer, attention.block_sizes)
        if self.budget:
            self.backlog = self._make_backlog(attention)
        self.staged = StagedStep(
            StagingLimits(self.max_num_reqs, self.num_query_per_req, self._max_context_rows(), self.max_model_len),
            [block_tables.input_block_tables[gid] for gid in attention.gids],
            attention.block_sizes,
            self.dflash.mask_token_id,
            self.device,
        )

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Choose the draft's graph mode: FULL graphs, or none."""
        full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        if full and self.attn_cg_support.min_cg_support.value < AttentionCGSupport.UNIFORM_BATCH.value:
            logger.warning(
                "vllm_dflash: the attention backend %s cannot run in CUDA graphs, so drafting runs eagerly; set "
                "--attention-backend to another one",
                self.attn_cg_support.min_cg_attn_backend,
            )
            self.meter.count(Fallback.EAGER_BACKEND)
            full = False
        mode = CUDAGraphMode.FULL_DECODE_ONLY if full else CUDAGraphMode.NONE
        own_sizes = self.trees is not None
        self.graphs = DraftGraphs(self.vllm_config, self.device, mode, self.num_query_per_req, own_sizes)

    def capture(self) -> None:
        """Capture the drafting step at every batch size."""
        assert self.graphs is not None
        self.staged.write_idle()
        self.idx_mapping.fill_(-1)
        self.graphs.capture_steps(self._prepare_capture)

    def _prepare_capture(self, num_reqs: int) -> Callable[[], None]:
        """The step of `num_reqs` requests over the staged rows."""
        num_context_rows = self._num_graph_context_rows(num_reqs)
        features = self._graph_features()[:num_context_rows]
        rows = self.staged.context_rows(0, num_context_rows)
        block = self.staged.block(num_reqs, self.max_model_len)
        metadata = self.attention.build(block, lambda group, common: group.build_metadata_for_cudagraph_capture(common))
        num_tokens_across_dp = self._same_on_every_dp_rank(num_reqs * self.num_query_per_req)

        def step() -> None:
            if self.supports_decode_metadata_update:
                self._update_draft_decode_metadata(metadata, num_reqs)
            drafts = self.proposer.run(features, rows, block, metadata, num_tokens_across_dp)
            self._keep(drafts)

        return step

    # A step.

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,  # [T, H]
        aux_hidden_states: list[torch.Tensor] | None,  # F tensors [>= T, H]
        num_sampled: torch.Tensor,  # [R]
        num_rejected: torch.Tensor,  # [R]
        last_sampled: torch.Tensor,  # [max_num_reqs, 1]
        next_prefill_tokens: torch.Tensor,  # [lookahead, max_num_reqs]
        temperature: torch.Tensor,  # [max_num_reqs]
        seeds: torch.Tensor,  # [max_num_reqs]
        dp_sync_state: DPSyncState | None = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Draft tokens [R, K]. Called by the runner after sampling."""
        assert aux_hidden_states, "the target returned no hidden states of inner layers"
        self.meter.begin_draft()
        if dummy_run:
            input_batch = self._that_fits(input_batch)
        num_reqs, num_rows = input_batch.num_reqs, input_batch.num_tokens
        if skip_attn_for_dummy_run:
            return self._profile(aux_hidden_states, num_reqs, num_rows)
        drafts = num_speculative_tokens != 0 and (self.budget is None or dummy_run or self.budget.drafts)
        if drafts and self._needs_logits:
            self._copy_request_inputs(num_reqs, input_batch.idx_mapping, temperature, seeds, dummy_run)
        step = StepInputs(
            features=last_hidden_states,  # not read: the tapped states are side by side only where they are used
            positions=input_batch.positions[:num_rows],
            query_start_loc=input_batch.query_start_loc,
            seq_lens=input_batch.seq_lens,
            num_rejected=num_rejected,
            anchors=AnchorSource(input_batch.idx_mapping, num_sampled, last_sampled, next_prefill_tokens[0]),
            block_tables=self.staged.block_tables,
            max_seq_len=self.max_model_len,
        )
        max_query_len = int(input_batch.num_scheduled_tokens.max())
        tapped = TappedStates(aux_hidden_states, num_rows)
        if self.trees:
            step, tapped = self.trees.accepted(input_batch, step, tapped, slot_mappings, num_sampled)
            max_query_len = max(max_query_len, self.num_query_per_req)
        desc, sync = self._dispatch(num_reqs, dp_sync_state, is_profile)
        # To the graph's size; without one, to what the data-parallel ranks agreed on.
        num_reqs_padded = desc.num_tokens // self.num_query_per_req
        in_graph = self._num_graph_context_rows(num_reqs_padded) if desc.cg_mode == CUDAGraphMode.FULL else 0
        self.staged.write(step, max_query_len, num_reqs_padded, max(tapped.num_rows, in_graph))
        if dummy_run:
            self.staged.write_nothing()
        if not drafts:
            self._inject_later(tapped, num_reqs)
            self.draft_tokens[:num_reqs].zero_()  # they may be verified as candidates that nobody drafted
        elif desc.cg_mode == CUDAGraphMode.FULL:
            self._replay(desc, input_batch, tapped, in_graph)
        else:
            self._inject_from(tapped, 0)
            block = self._block(input_batch, num_reqs_padded)
            num_tokens_across_dp = None if sync is None else sync.num_tokens_across_dp
            self._keep(self.proposer.draft(block, self._build_metadata(block), num_tokens_across_dp))
        if not dummy_run:
            self._count(drafts, has_graph=desc.cg_mode == CUDAGraphMode.FULL)
        return self.draft_tokens[:num_reqs]

    def _that_fits(self, batch: InputBatch) -> InputBatch:
        """A made-up batch, which vLLM pads to the target's graph, without requests that no step has blocks for."""
        most = self.most_blocks
        if batch.num_reqs <= most:
            return batch
        num_tokens = int(batch.query_start_loc_np[most])
        return replace(batch, num_reqs=most, num_tokens=num_tokens, idx_mapping=batch.idx_mapping[:most])

    def _count(self, drafts: bool, has_graph: bool) -> None:
        """The step for the metrics."""
        self.meter.end_draft(drafts)
        if drafts and not has_graph and self.graphs is not None and self.graphs.needs_capture():
            self.meter.count(Fallback.NO_GRAPH)
        if self.budget is not None and not self.budget.drafts:
            self.meter.count(Fallback.DOES_NOT_PAY)

    def report(self) -> StepReport:
        """What the step's metrics are. Called by the runner after drafting."""
        budget = self.budget
        if budget is None:
            return self.meter.report(budget=None, break_even=None)
        in_force = BudgetInForce(budget.num_verified, budget.num_reqs)
        return self.meter.report(in_force, budget.break_even)

    def _replay(
        self,
        desc: BatchExecutionDescriptor,
        input_batch: InputBatch,
        tapped: TappedStates,
        num_graph_rows: int,
    ) -> None:
        """Run the captured step. Context rows beyond the graph's, a prefill's, are injected first."""
        assert self.graphs is not None and desc.num_reqs is not None
        self._inject_from(tapped, num_graph_rows)
        inside = min(tapped.num_rows, num_graph_rows)
        tapped.write(self._graph_features()[:inside], 0, inside)
        if not self.supports_decode_metadata_update:
            # Some builders keep what the graph reads in buffers of their own, which this fills.
            self._build_metadata(self._block(input_batch, desc.num_reqs))
        self.graphs.run_fullgraph(desc)

    def _inject_from(self, tapped: TappedStates, start: int) -> None:
        """Inject context rows from `start` on outside of a graph, and before them those of steps without drafts."""
        if self.backlog is not None:
            self.backlog.inject()
        # The drafter is compiled, and its memory profiled, for a step's rows. Trees beside prompts may have more.
        for first in range(start, tapped.num_rows, self.max_num_tokens):
            end = min(first + self.max_num_tokens, tapped.num_rows)
            self.proposer.inject(tapped.features(first, end), self.staged.context_rows(first, end))

    def _inject_later(self, tapped: TappedStates, num_reqs: int) -> None:
        """Inject all context rows of a step without drafts before the next step with drafts."""
        rows = self.staged.context_rows(0, tapped.num_rows)
        if self.backlog is None or not self.backlog.keep(tapped, rows, num_reqs):
            self._inject_from(tapped, 0)

    @torch.inference_mode()
    def before_step(self, scheduler_output: SchedulerOutput) -> None:
        """Called before the runner lets requests go."""
        if self.backlog is not None:
            lost = scheduler_output.finished_req_ids or scheduler_output.preempted_req_ids
            # The next part of a session's input may begin before its last row, and comes as a new request.
            lost = lost or scheduler_output.scheduled_new_reqs
            self.backlog.before_step(bool(lost), has_rows=scheduler_output.total_num_scheduled_tokens > 0)

    def _block(self, input_batch: InputBatch, num_reqs: int) -> BlockInputs:
        num_query_rows = self.num_query_per_req
        bound = torch.zeros(num_reqs, dtype=torch.int32)
        real = input_batch.num_reqs
        bound[:real] = (input_batch.seq_lens_cpu_upper_bound[:real] + num_query_rows).clamp(max=self.max_model_len)
        return self.staged.block(num_reqs, int(bound.max()), bound)

    def _build_metadata(self, block: BlockInputs) -> dict[str, Any]:
        return self.attention.build(block, lambda group, common: group.build_metadata(common))

    def _dispatch(
        self, num_reqs: int, dp_sync_state: DPSyncState | None, eager: bool
    ) -> tuple[BatchExecutionDescriptor, DPSyncState | None]:
        """Which graph, if any. Under data parallelism all ranks take the same one, agreed on with the target's."""
        num_tokens, sync = num_reqs * self.num_query_per_req, None
        if dp_sync_state is not None:
            # The target's graph may have room for more requests than any rank can have.
            of_blocks = replace(dp_sync_state, num_reqs=min(dp_sync_state.num_reqs, self.most_blocks))
            sync, num_tokens = self._build_uniform_batch_dp_sync(of_blocks, num_reqs, self.num_query_per_req)
        return dispatch_cg_and_sync_dp(
            self.graphs,
            num_reqs,
            num_tokens,
            uniform_token_count=self.num_query_per_req,
            dp_size=self.dp_size,
            dp_rank=self.dp_rank,
            need_eager=eager,
            dp_sync_state=sync,
        )

    def _profile(
        self,
        aux_hidden_states: list[torch.Tensor],  # F tensors [>= T, H]
        num_reqs: int,
        num_rows: int,
    ) -> torch.Tensor:
        """The arithmetic of a step before there are caches: for memory profiling."""
        features = torch.cat([states[:num_rows] for states in aux_hidden_states], dim=-1)
        positions = torch.zeros(num_rows, dtype=torch.int64, device=self.device)
        block = BlockInputs.made_up(num_reqs, self.num_query_per_req, self.device)
        num_tokens_across_dp = self._same_on_every_dp_rank(num_reqs * self.num_query_per_req)
        self._keep(self.proposer.profile(features, positions, block, num_tokens_across_dp))
        return self.draft_tokens[:num_reqs]

    # Sampling.

    @property
    def _needs_logits(self) -> bool:
        """Whether more than the likeliest tokens is asked for: draft probabilities, or estimates from them."""
        return self.draft_logits is not None or self.use_acceptance_estimator or self.trees is not None

    def _sampler(self) -> Sampler:
        if self.trees:
            return self._sample_trees
        return self._sample_with_logits if self._needs_logits else greedy_drafts

    def _sample_trees(
        self,
        model: DFlashDraftModel,
        hidden_states: torch.Tensor,  # [R*Q, H]
        block: BlockInputs,
    ) -> Drafts:
        """The likeliest candidates of the block's distributions."""
        assert self.trees is not None
        logits = self.compute_draft_logits(mask_rows(hidden_states, block.num_query_rows), 0)
        num_reqs = len(logits) // (block.num_query_rows - 1)
        return self.trees.draft(logits, self.idx_mapping[:num_reqs], self.temperature)

    def _sample_with_logits(
        self,
        model: DFlashDraftModel,
        hidden_states: torch.Tensor,  # [R*Q, H]
        block: BlockInputs,
    ) -> Drafts:
        """Drafts sampled at each request's temperature; their logits stay for the rejection sampler."""
        rows = mask_rows(hidden_states, block.num_query_rows)
        positions = block.positions.view(-1, block.num_query_rows)
        num_reqs, num_drafts = positions.shape[0], block.num_query_rows - 1
        tokens = self.sample_draft(
            rows,
            positions[:, :-1].flatten(),  # a draw is keyed by the position before the token's
            self.idx_mapping[:num_reqs].repeat_interleave(num_drafts),
            self.temperature,
            self.seeds,
            torch.arange(num_drafts, dtype=torch.int32, device=self.device).repeat(num_reqs),
            self.draft_logits,
        )
        return Drafts(tokens.view(num_reqs, num_drafts))

    def compute_draft_logits(
        self,
        hidden_states: torch.Tensor,  # [N, H]
        spec_step_idx: int,
    ) -> torch.Tensor:
        """Logits over the target's vocabulary, [N, V]; tokens outside a reduced draft vocabulary get -inf."""
        return self.model.to_target_logits(self.model.compute_logits(hidden_states))

    # Sizes.

    def _keep(self, drafts: Drafts) -> None:
        self.draft_tokens[: drafts.token_ids.shape[0]].copy_(drafts.token_ids)

    def _max_context_rows(self) -> int:
        most = max(self.max_num_tokens, self._num_graph_context_rows(self.max_num_reqs))
        return self.trees.most_rows(self.max_num_reqs, most) if self.trees else most

    def _num_graph_context_rows(self, num_reqs: int) -> int:
        """Context rows of a graph of `num_reqs` requests: all that can be accepted of a verification each."""
        return min(num_reqs * self.num_query_per_req, self.max_num_tokens)

    def _graph_features(self) -> torch.Tensor:
        """Fixed memory for the context features of the largest graph, made when it is first needed."""
        if self.features is None:
            assert self.graphs is not None
            num_rows = self._num_graph_context_rows(self.graphs.most_requests)
            self.features = torch.zeros(num_rows, self.dflash.feature_width, dtype=self.dtype, device=self.device)
        return self.features

    def _make_backlog(self, attention: DraftAttention) -> ContextBacklog:
        """Memory for context that is injected later."""
        specs = [group.kv_cache_spec for group in attention.groups]
        windows = [window for spec in specs if (window := get_kv_cache_spec_sliding_window(spec))]
        sizes = (len(attention.gids), self.dflash.feature_width, min(windows, default=None), self.max_num_tokens)
        return ContextBacklog(*sizes, self.dtype, self.device, self.proposer.inject)

    def _same_on_every_dp_rank(self, num_tokens: int) -> torch.Tensor | None:
        return torch.full((self.dp_size,), num_tokens, dtype=torch.int32) if self.dp_size > 1 else None


def _schedule_windows_at_run_time(groups: Sequence[AttentionGroup]) -> None:
    """Keep FlashAttention from scheduling sliding-window draft layers ahead of the forward.

    Its builder takes one window for all layers of the engine, the target's included, and knows no symmetric window.
    """
    for group in groups:
        builder = group.get_metadata_builder()
        if hasattr(builder, "aot_schedule") and get_kv_cache_spec_sliding_window(builder.kv_cache_spec):
            builder.aot_schedule = False
