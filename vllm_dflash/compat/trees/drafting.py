# SPDX-License-Identifier: Apache-2.0
"""The V2 adapter's part in draft trees: what a drafter reads of a verification, and what it drafts.

Letters: R requests, T rows of the step, C rows that the drafter reads of it, K depths, V vocabulary, N nodes, F tapped
layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_dflash.calibration import SAMPLES_FROM
from vllm_dflash.compat.ownership import TreeShape
from vllm_dflash.compat.trees.store import TreeStore, verifying
from vllm_dflash.kernels.calibrate import calibrate
from vllm_dflash.kernels.move_kv import KVCaches, move_accepted_kv
from vllm_dflash.kernels.top_choices import reference_top_choices, top_choices
from vllm_dflash.kernels.tree_build import build_trees
from vllm_dflash.kernels.tree_rows import AcceptedRows, write_accepted_rows
from vllm_dflash.proposer import Drafts, StepInputs
from vllm_dflash.proposer.tapped_states import TappedStates


class TreeDrafting:
    """Between the target's way through a verification and the trees of the next one."""

    def __init__(self, shape: TreeShape, max_num_reqs: int, max_num_rows: int, device: torch.device) -> None:
        self.shape = shape
        self._rows = AcceptedRows.allocate(max_num_reqs, self.most_rows(max_num_reqs, max_num_rows), device)
        self.store: TreeStore | None = None  # profiling comes before there is one
        self.target_layers: dict[str, Any] = {}
        self._caches: list[tuple[str, KVCaches]] | None = None

    def most_rows(self, max_num_reqs: int, max_num_rows: int) -> int:
        """Rows of a step that the drafter may read, or more: a step of few candidates is padded."""
        return max_num_rows + max_num_reqs * (1 + self.shape.num_depths)

    def bind(self, store: TreeStore, target_layers: Mapping[str, Any]) -> None:
        """Say where trees are kept, and which of the target's layers have K/V to move, by name."""
        self.store, self.target_layers, self._caches = store, dict(target_layers), None

    def accepted(
        self,
        batch: InputBatch,
        step: StepInputs,
        tapped: TappedStates,
        slot_mappings: Mapping[str, torch.Tensor],  # by layer name, [T]
        num_sampled: torch.Tensor,  # [R]
    ) -> tuple[StepInputs, TappedStates]:
        """The step as one of accepted rows, in the order of the text. Their K/V in the target's caches moves too."""
        if self.store is None or not batch.num_draft_tokens:
            return step, tapped
        assert step.num_rejected is not None
        num_reqs, num_rows = verifying(batch)
        for name, caches in self._caches_by_slots(slot_mappings):
            move_accepted_kv(
                caches,
                slot_mappings[name],
                self.store.way,
                batch.idx_mapping[:num_reqs],
                batch.query_start_loc,
                batch.cu_num_logits,
                num_sampled,
            )
        longest = int(batch.num_scheduled_tokens[num_reqs:].max(initial=1)) if num_reqs < batch.num_reqs else 1
        write_accepted_rows(
            self._rows,
            self.store.way,
            batch.idx_mapping,
            batch.positions,
            batch.query_start_loc,
            batch.cu_num_logits,
            batch.seq_lens,
            num_sampled,
            step.num_rejected,
            batch.num_reqs,
            num_reqs,
            longest,
        )
        num_accepted_rows = num_reqs * (1 + self.shape.num_depths) + batch.num_tokens - num_rows
        accepted = replace(
            step,
            positions=self._rows.positions[:num_accepted_rows],
            query_start_loc=self._rows.query_start_loc,
            seq_lens=self._rows.seq_lens,
            num_rejected=self._rows.num_rejected,
        )
        return accepted, TappedStates(tapped.states, num_accepted_rows, self._rows.rows[:num_accepted_rows])

    def draft(
        self,
        logits: torch.Tensor,  # [R*K, V]
        state_rows: torch.Tensor,  # [R] negative: of nobody
        temperature: torch.Tensor,  # [rows of the state]
    ) -> Drafts:
        """The likeliest candidates of the block's distributions, kept for the next verification."""
        num_reqs, shape = len(state_rows), self.shape
        # Triton's interpreter takes seconds for a whole vocabulary.
        choose = top_choices if logits.device.type != "cpu" else reference_top_choices
        drafted = torch.zeros(num_reqs, shape.num_nodes, dtype=torch.int64, device=logits.device)
        if self.store is None:
            choose(logits, torch.ones(len(logits), device=logits.device), shape.num_choices)
            return Drafts(drafted)
        calibrate(self.store.seen, state_rows, temperature)
        of_request = temperature[state_rows][:, None]
        samples = of_request >= SAMPLES_FROM
        factors = self.store.seen.factors[samples[:, 0].long()]  # [R, D]
        if not shape.is_auto:
            # Which candidates are likeliest is no question of confidence where the target takes its likeliest token.
            factors = torch.where(samples, factors, 1.0)
        # Then as at temperature 1: every candidate may be the target's likeliest.
        scales = torch.where(samples, factors / of_request, factors)
        log_probs, token_ids = choose(logits, scales.flatten(), shape.num_choices)
        of_choices = (num_reqs, shape.num_depths, shape.num_choices)
        build_trees(
            self.store.trees,
            drafted,
            log_probs.view(of_choices),
            token_ids.view(of_choices),
            state_rows,
            self.store.as_chain,
            factors,
            self.store.seen,
        )
        return Drafts(drafted)

    def _caches_by_slots(self, slot_mappings: Mapping[str, torch.Tensor]) -> list[tuple[str, KVCaches]]:
        """The target's caches, those together whose layers share slots: one layer's name, and all of them."""
        if self._caches is None:
            groups: dict[int, list[str]] = {}
            for name in self.target_layers:
                groups.setdefault(slot_mappings[name].data_ptr(), []).append(name)
            self._caches = [
                (names[0], KVCaches.of([self.target_layers[name].kv_cache for name in names]))
                for names in groups.values()
            ]
        return self._caches
