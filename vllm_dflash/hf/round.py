# SPDX-License-Identifier: Apache-2.0
"""One round of speculative decoding, on the device from one end to the other: draft, verify, keep.

Nothing in it waits for the device or looks at a value, so that a whole round can be a CUDA graph (`hf/graphs.py`).

Letters: B sequences, Q rows of a block, K = Q - 1, N nodes of a tree, D depths, T new context rows, F tapped layers, H
hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vllm_dflash.hf.choosing import Sampling
from vllm_dflash.hf.slot_cache import SlotCache
from vllm_dflash.hf.target_features import TargetFeatures
from vllm_dflash.hf.verification import TargetMasks, candidate_visibility, prompt_visibility
from vllm_dflash.tree import DraftTree, Walk, ancestor_mask, build_tree, chain, chain_mask, walk

if TYPE_CHECKING:
    from vllm_dflash.hf.modeling import DFlashDraftModel
    from vllm_dflash.hf.processors import ProcessedChoice
    from vllm_dflash.hf.prompts import Prompts


@dataclass(frozen=True)
class ContextRows:
    """Features of rows that the target ran since the last draft. Rows that do not count are padding."""

    features: torch.Tensor  # [B, T, F*H]
    positions: torch.Tensor  # [B, T]
    is_real: torch.Tensor  # [B, T] bool

    def first(self, count: int) -> ContextRows:
        """The first `count` rows."""
        return ContextRows(self.features[:, :count], self.positions[:, :count], self.is_real[:, :count])


@dataclass(frozen=True)
class RoundState:
    """What a round hands to the next."""

    anchors: torch.Tensor  # [B]; each text's last token, which the target has not seen
    lengths: torch.Tensor  # [B]; tokens before it
    context: ContextRows

    def clone(self) -> RoundState:
        """The same in memory of its own."""
        context = ContextRows(
            self.context.features.clone(), self.context.positions.clone(), self.context.is_real.clone()
        )
        return RoundState(self.anchors.clone(), self.lengths.clone(), context)

    def copy_(self, other: RoundState) -> None:
        """Overwrite this one's memory."""
        self.anchors.copy_(other.anchors)
        self.lengths.copy_(other.lengths)
        self.context.features.copy_(other.context.features)
        self.context.positions.copy_(other.context.positions)
        self.context.is_real.copy_(other.context.is_real)


@dataclass(frozen=True)
class Window:
    """Slots of the caches that a round's attention gets."""

    draft: int
    target: int
    is_exact: bool  # the drafter's are those of one sequence and its block: no row must be hidden from it


class Round:
    """A target, a drafter and what both remember of a batch."""

    def __init__(
        self,
        draft: DFlashDraftModel,
        target: nn.Module,
        sampling: Sampling,
        tree_budget: int | None,
        capacity: int,
    ) -> None:
        self.draft, self.target, self.sampling = draft, target, sampling
        self.tree_budget, self.num_depths = tree_budget, draft.block_size - 1
        self.num_rows = 1 + (tree_budget or self.num_depths)  # of a verification
        self.widest = max(draft.block_size, self.num_rows)  # slots that a round may use behind a text
        self.features = TargetFeatures(target, draft.target_layer_ids)
        self.processed: ProcessedChoice | None = None  # instead of `sampling`, where logits depend on the text
        self.masks = TargetMasks(target)
        self.target_cache = SlotCache(target.config.get_text_config(decoder=True).num_hidden_layers, capacity)
        self.draft_cache = SlotCache(draft.dflash.num_hidden_layers, capacity)

    def window(self, longest: int, num_sequences: int) -> Window:
        """What a round needs whose longest text has used so many slots."""
        return Window(longest + self.draft.block_size, longest + self.num_rows, is_exact=num_sequences == 1)

    def prefill(self, prompts: Prompts) -> RoundState:
        """The target over the prompts: their features, and the first token of each."""
        positions, width = prompts.positions, prompts.token_ids.shape[1]
        self.target_cache.place(torch.where(prompts.is_real, positions, self.target_cache.spare_slot), width)
        visible = prompt_visibility(positions)
        logits = self._run_target(prompts.token_ids, positions, visible, None, logits_to_keep=1)  # [B, 1, V]
        context = ContextRows(self.features.take(), positions, prompts.is_real)
        lengths = torch.tensor(prompts.lengths, device=positions.device)
        choose = self.processed.first if self.processed is not None else self.sampling.choose
        return RoundState(choose(logits[:, -1]), lengths, context)

    def __call__(
        self,
        state: RoundState,
        active: torch.Tensor,  # [B] bool; the others' texts have ended
        window: Window,
    ) -> tuple[RoundState, torch.Tensor]:
        """The next state, and a report [B, D+2] int64: the accepted tokens, how many count, the token after them."""
        tree = draft_tree(self.draft, self.target, state, self.draft_cache, window, self.tree_budget)
        if self.tree_budget is None:
            ancestors = chain_mask(self.num_depths, tree.depths.device).expand(len(state.anchors), -1, -1)
        else:
            ancestors = ancestor_mask(tree, self.num_depths)
        logits = self._verify(state, tree, ancestors, window.target)  # [B, 1+N, V]
        if self.processed is not None:
            walked = self.processed.walk(tree, logits, self.num_depths)
        else:
            walked = walk(tree, ancestors, self.sampling.choose(logits), self.num_depths)
        report = torch.cat(
            (accepted_tokens(tree, walked), walked.num_accepted[:, None], walked.next_token_ids[:, None]), dim=1
        )
        return self._keep(state, tree, walked, active), report

    def _verify(
        self,
        state: RoundState,
        tree: DraftTree,
        ancestors: torch.Tensor,  # [B, 1+N, 1+N] bool
        num_slots: int,
    ) -> torch.Tensor:
        """One target forward over anchors and candidates: logits [B, 1+N, V]."""
        rows = torch.cat((state.anchors[:, None], tree.token_ids), dim=1)
        depths = torch.cat((torch.zeros_like(rows[:, :1]), tree.depths), dim=1)
        positions = state.lengths[:, None] + depths
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
    ) -> RoundState:
        """The accepted way becomes context, the rest is forgotten."""
        way = torch.cat((torch.zeros_like(walked.nodes[:, :1]), walked.nodes + 1), dim=1)  # [B, 1+D] rows
        is_real = (counting(way) <= walked.num_accepted[:, None]) & active[:, None]
        way = way.clamp(max=tree.token_ids.shape[1])
        positions = state.lengths[:, None] + counting(way)
        if self.tree_budget is not None:  # a chain's rows lie together already
            spare = self.target_cache.spare_slot
            sources = torch.where(is_real, state.lengths[:, None] + way, spare)
            self.target_cache.move(sources, torch.where(is_real, positions, spare))
        features = self.features.take()
        features = features.gather(1, way[:, :, None].expand(-1, -1, features.shape[2]))
        anchors = torch.where(active, walked.next_token_ids, state.anchors)
        lengths = state.lengths + (walked.num_accepted + 1) * active
        return RoundState(anchors, lengths, ContextRows(features, positions, is_real))


def draft_tree(
    draft: DFlashDraftModel,
    target: nn.Module,
    state: RoundState,
    cache: SlotCache,  # K/V of all earlier context rows
    window: Window,
    tree_budget: int | None,
) -> DraftTree:
    """One forward of the drafter over [anchor, mask x K]: a chain of its likeliest tokens, or a tree of N nodes."""
    context = state.context
    block = torch.full((len(state.anchors), draft.block_size), draft.mask_token_id, device=context.positions.device)
    block[:, 0] = state.anchors
    block_slots = state.lengths[:, None] + counting(block)
    context_slots = torch.where(context.is_real, context.positions, cache.spare_slot)
    cache.place(torch.cat((context_slots, block_slots), dim=1), window.draft)
    visible = None  # [B, 1, 1, S]
    if not window.is_exact:
        visible = (torch.arange(window.draft, device=block.device) <= block_slots[:, -1:])[:, None, None]
    hidden = draft(
        position_ids=torch.cat((context.positions, block_slots), dim=1),
        noise_embedding=draft.embed(block, target),
        target_hidden=context.features,
        attention_mask=visible,
        past_key_values=cache,
    )
    logits = draft.draft_logits(hidden[:, 1:], target)  # [B, K, V]
    if tree_budget is None:
        return chain(logits.argmax(dim=-1))
    log_probs, token_ids = logits.float().log_softmax(dim=-1).topk(min(tree_budget, logits.shape[-1]), dim=-1)
    return build_tree(log_probs, token_ids, tree_budget)


def accepted_tokens(tree: DraftTree, walked: Walk) -> torch.Tensor:
    """Tokens of the walk's nodes, [B, D]; what stands behind the accepted ones does not count."""
    return tree.token_ids.gather(1, walked.nodes.clamp(min=0))


def counting(
    rows: torch.Tensor,  # [B, N]
) -> torch.Tensor:
    """0, 1, ..., N-1."""
    return torch.arange(rows.shape[1], device=rows.device)
