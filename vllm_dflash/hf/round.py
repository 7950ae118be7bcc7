# SPDX-License-Identifier: Apache-2.0
"""One round of speculative decoding, on the device from one end to the other: draft, verify, keep.

Nothing in it waits for the device or looks at a value, so that a whole round can be a CUDA graph (`hf/graphs.py`); the
exceptions are what asks the host: logits processors, and a budget that is chosen by the tree at hand.

Letters: B sequences, Q rows of a block, K = Q - 1, N nodes of a tree, D depths, T new context rows, F tapped layers, H
hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vllm_dflash.hf.budget import expected_acceptance
from vllm_dflash.hf.calibration import Calibration
from vllm_dflash.hf.drafting import Drafted, DraftRule, draft
from vllm_dflash.hf.rejection import reject
from vllm_dflash.hf.slot_cache import SlotCache
from vllm_dflash.hf.state import ContextRows, RoundReport, RoundState, Window
from vllm_dflash.hf.target_features import TargetFeatures
from vllm_dflash.hf.verification import TargetMasks, candidate_visibility, prompt_visibility
from vllm_dflash.tree import DraftTree, Walk, ancestor_mask, chain_mask, walk

if TYPE_CHECKING:
    from vllm_dflash.hf.modeling import DFlashDraftModel
    from vllm_dflash.hf.processors import ProcessedChoice
    from vllm_dflash.hf.prompts import Prompts

Budget = int | Callable[[torch.Tensor], int]  # nodes to verify, or what says so of `RoundReport.expected`


class Round:
    """A target, a drafter and what both remember of a batch."""

    def __init__(self, model: DFlashDraftModel, target: nn.Module, rule: DraftRule, capacity: int) -> None:
        self.model, self.target, self.rule, self.sampling = model, target, rule, rule.sampling
        self.num_depths = model.block_size - 1
        self.widest = rule.widest(model.block_size)
        self.processed: ProcessedChoice | None = None  # instead of `sampling`, where logits depend on the text
        self.features = TargetFeatures(target, model.target_layer_ids)
        self.masks = TargetMasks(target)
        self.target_cache = SlotCache(target.config.get_text_config(decoder=True).num_hidden_layers, capacity)
        self.draft_cache = SlotCache(model.dflash.num_hidden_layers, capacity)

    def prefill(self, prompts: Prompts, calibration: Calibration | None = None) -> RoundState:
        """The target over the prompts: their features, and the first token of each."""
        positions, width = prompts.positions, prompts.token_ids.shape[1]
        self.target_cache.place(torch.where(prompts.is_real, positions, self.target_cache.spare_slot), width)
        visible = prompt_visibility(positions)
        logits = self._run_target(prompts.token_ids, positions, visible, None, logits_to_keep=1)  # [B, 1, V]
        context = ContextRows(self.features.take(), positions, prompts.is_real)
        self._check_cache()
        lengths = torch.tensor(prompts.lengths, device=positions.device)
        choose = self.processed.first if self.processed is not None else self.sampling.choose
        calibration = calibration or Calibration.fresh(self.num_depths, positions.device)
        return RoundState(choose(logits[:, -1]), lengths, context, calibration)

    def _check_cache(self) -> None:
        without = [index for index, layer in enumerate(self.target_cache.layers) if not layer.is_initialized]
        if without:
            raise ValueError(
                f"layers {without} of {type(self.target).__name__} keep no K/V: what they remember otherwise cannot "
                "forget rejected drafts"
            )

    def __call__(
        self,
        state: RoundState,
        active: torch.Tensor,  # [B] bool; the others' texts have ended
        window: Window,
        budget: Budget | None = None,  # None: all that is drafted
    ) -> tuple[RoundState, RoundReport]:
        """The next state, and what to tell the host."""
        drafted = draft(self.model, self.target, state, self.draft_cache, window, self.rule)
        tree, expected = drafted.tree, None
        if budget is not None:
            expected = expected_acceptance(tree.log_probs, active)
            tree = tree.first(budget if isinstance(budget, int) else budget(expected))
        ancestors = self._ancestors(tree)
        logits = self._verify(state, tree, ancestors, window)  # [B, 1+N, V]
        walked = self._walk(drafted, tree, ancestors, logits)
        tokens = tree.token_ids.gather(1, walked.nodes.clamp(min=0))  # [B, D]; behind the accepted ones: anything
        report = torch.cat((tokens, walked.num_accepted[:, None], walked.next_token_ids[:, None]), dim=1)
        calibration = learned(state.calibration, drafted, tokens, walked, active)
        return self._keep(state, tree, walked, active, calibration), RoundReport(report, expected)

    def _ancestors(self, tree: DraftTree) -> torch.Tensor:
        """Which rows of a verification see which, [B, 1+N, 1+N] bool."""
        if self.rule.num_nodes is None:
            return chain_mask(self.num_depths, tree.depths.device).expand(len(tree.depths), -1, -1)
        return ancestor_mask(tree, self.num_depths)

    def _walk(
        self,
        drafted: Drafted,
        tree: DraftTree,
        ancestors: torch.Tensor,  # [B, 1+N, 1+N] bool
        logits: torch.Tensor,  # [B, 1+N, V]
    ) -> Walk:
        """What of the candidates the target keeps, and its own token after that."""
        if self.processed is not None:
            return self.processed.walk(tree, logits, self.num_depths)
        if drafted.probs is not None:
            return reject(tree.token_ids, drafted.probs, logits, self.sampling)
        return walk(tree, ancestors, self.sampling.choose(logits), self.num_depths)

    def _verify(
        self,
        state: RoundState,
        tree: DraftTree,
        ancestors: torch.Tensor,  # [B, 1+N, 1+N] bool
        window: Window,
    ) -> torch.Tensor:
        """One target forward over anchors and candidates: logits [B, 1+N, V]."""
        rows = torch.cat((state.anchors[:, None], tree.token_ids), dim=1)
        depths = torch.cat((torch.zeros_like(rows[:, :1]), tree.depths), dim=1)
        positions = state.lengths[:, None] + depths
        num_slots = window.slots(rows.shape[1])
        visible = candidate_visibility(state.lengths, ancestors, num_slots)
        self.target_cache.place(state.lengths[:, None] + counting(rows), num_slots)
        return self._run_target(rows, positions, visible, state.lengths)

    def _run_target(
        self,
        token_ids: torch.Tensor,  # [B, Q]
        positions: torch.Tensor,  # [B, Q]
        visible: torch.Tensor,  # [B, Q, S] bool
        lengths: torch.Tensor | None,  # [B] slots in use, right behind which the rows are; None: at their positions
        **options: Any,
    ) -> torch.Tensor:
        return self.target(
            input_ids=token_ids,
            position_ids=positions,
            attention_mask=self.masks(visible, positions, lengths, self.target.dtype),
            past_key_values=self.target_cache,
            use_cache=True,
            **options,
        ).logits

    def _keep(
        self,
        state: RoundState,
        tree: DraftTree,
        walked: Walk,
        active: torch.Tensor,  # [B] bool
        calibration: Calibration,
    ) -> RoundState:
        """The accepted way becomes context, the rest is forgotten."""
        way = torch.cat((torch.zeros_like(walked.nodes[:, :1]), walked.nodes + 1), dim=1)  # [B, 1+D] rows
        is_real = (counting(way) <= walked.num_accepted[:, None]) & active[:, None]
        way = way.clamp(max=tree.token_ids.shape[1])
        positions = state.lengths[:, None] + counting(way)
        if self.rule.num_nodes is not None:  # a chain's rows lie together already
            spare = self.target_cache.spare_slot
            sources = torch.where(is_real, state.lengths[:, None] + way, spare)
            self.target_cache.move(sources, torch.where(is_real, positions, spare))
        features = self.features.take()
        features = features.gather(1, way[:, :, None].expand(-1, -1, features.shape[2]))
        anchors = torch.where(active, walked.next_token_ids, state.anchors)
        lengths = state.lengths + (walked.num_accepted + 1) * active
        return RoundState(anchors, lengths, ContextRows(features, positions, is_real), calibration)


def learned(
    calibration: Calibration,
    drafted: Drafted,
    tokens: torch.Tensor,  # [B, D]; the accepted ones first
    walked: Walk,
    active: torch.Tensor,  # [B] bool
) -> Calibration:
    """With what the target said this round: the accepted tokens and its own after them."""
    if drafted.choices is None:
        return calibration
    num_said = (walked.num_accepted + 1) * active
    is_next = counting(tokens) == walked.num_accepted[:, None]
    return calibration.learned(drafted.choices, torch.where(is_next, walked.next_token_ids[:, None], tokens), num_said)


def counting(
    rows: torch.Tensor,  # [B, N]
) -> torch.Tensor:
    """0, 1, ..., N-1."""
    return torch.arange(rows.shape[1], device=rows.device)
