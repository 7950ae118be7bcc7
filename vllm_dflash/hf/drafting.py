# SPDX-License-Identifier: Apache-2.0
"""One forward of the drafter, and what is made of its distributions: a chain or a tree.

Letters: B sequences, Q rows of a block, K = Q - 1 depths, N nodes of a tree, C choices, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from vllm_dflash.hf.calibration import Calibration, Choices
from vllm_dflash.hf.choosing import Sampling
from vllm_dflash.hf.slot_cache import SlotCache
from vllm_dflash.tree import DraftTree, build_tree, chain

if TYPE_CHECKING:
    from vllm_dflash.hf.modeling import DFlashDraftModel
    from vllm_dflash.hf.state import RoundState, Window

#: Of a depth's tokens, so many are looked at to calibrate a chain.
CHAIN_CHOICES = 32


@dataclass(frozen=True)
class DraftRule:
    """What is drafted."""

    num_nodes: int | None  # of a tree; None: a chain of the whole block
    sampling: Sampling  # the target's
    is_probabilistic: bool  # a chain's tokens are samples of the drafter's distributions
    calibrates: bool  # what the target says is learned from

    def widest(self, block_size: int) -> int:
        """Slots that a round may use behind a text: a block, or an anchor and its candidates."""
        return max(block_size, 1 + (self.num_nodes or 0))


@dataclass(frozen=True)
class Drafted:
    """Candidates, and what they were chosen from."""

    tree: DraftTree
    choices: Choices | None  # None: nothing is to be learned from them
    probs: torch.Tensor | None  # [B, K, V]; of which a chain's tokens are samples


def draft(
    model: DFlashDraftModel,
    target: nn.Module,
    state: RoundState,
    cache: SlotCache,  # K/V of all earlier context rows
    window: Window,
    rule: DraftRule,
) -> Drafted:
    """The candidates of a round."""
    return chosen(block_logits(model, target, state, cache, window), state.calibration, rule)


def block_logits(
    model: DFlashDraftModel,
    target: nn.Module,
    state: RoundState,
    cache: SlotCache,
    window: Window,
) -> torch.Tensor:
    """One forward over [anchor, mask x K] behind the context: [B, K, V]."""
    context = state.context
    block = torch.full((len(state.anchors), model.block_size), model.mask_token_id, device=context.positions.device)
    block[:, 0] = state.anchors
    block_slots = state.lengths[:, None] + torch.arange(model.block_size, device=block.device)
    context_slots = torch.where(context.is_real, context.positions, cache.spare_slot)
    num_slots = window.slots(model.block_size)
    cache.place(torch.cat((context_slots, block_slots), dim=1), num_slots)
    visible = None  # [B, 1, 1, S]; one sequence's slots end where its block does
    if len(state.anchors) > 1 or not window.is_exact:
        visible = (torch.arange(num_slots, device=block.device) <= block_slots[:, -1:])[:, None, None]
    hidden = model(
        position_ids=torch.cat((context.positions, block_slots), dim=1),
        noise_embedding=model.embed(block, target),
        target_hidden=context.features,
        attention_mask=visible,
        past_key_values=cache,
    )
    return model.draft_logits(hidden[:, 1:], target)


def chosen(
    logits: torch.Tensor,  # [B, K, V]
    calibration: Calibration,
    rule: DraftRule,
) -> Drafted:
    """A chain of likeliest tokens, a chain of samples, or a tree."""
    if rule.num_nodes is None and not rule.is_probabilistic:
        return Drafted(chain(logits.argmax(dim=-1)), None, None)
    sampling = rule.sampling
    logits = logits.float() / (sampling.temperature if rule.num_nodes is None else sampling.tree_temperature)
    num_choices = min(rule.num_nodes or CHAIN_CHOICES, logits.shape[-1])
    choices = Choices(*logits.topk(num_choices, dim=-1))
    calibrated = logits * calibration.factors[:, None]
    if rule.num_nodes is not None:
        log_probs = choices.logits * calibration.factors[:, None] - calibrated.logsumexp(dim=-1, keepdim=True)
        tree = build_tree(log_probs, choices.token_ids, rule.num_nodes)
        return Drafted(tree, choices if rule.calibrates else None, None)
    probs = rule.sampling.warped(calibrated).softmax(dim=-1)
    return Drafted(chain(rule.sampling.sample(probs)), choices, probs)
