# SPDX-License-Identifier: Apache-2.0
"""DFlash speculative decoding on Transformers, as plainly as it can be said (paper, section 3; Algorithm 1).

One round: draft a block, verify it in one target forward, keep the longest way that the target itself would have gone
and the target's next token after it. What comes out is the target's own text. What is verified is a chain of the
likeliest tokens, or a tree of the likeliest continuations (`vllm_dflash.tree`); a chain is a tree of one branch.

Letters: B sequences, Q rows of a block, K = Q - 1, N nodes of a tree, D depths, T new context rows, F tapped layers, H
hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vllm_dflash.hf.choosing import Sampling
from vllm_dflash.hf.prompts import Prompts, check_pair, read_prompts
from vllm_dflash.hf.slot_cache import SlotCache
from vllm_dflash.hf.target_features import TargetFeatures
from vllm_dflash.hf.verification import TargetMasks, candidate_visibility, prompt_visibility
from vllm_dflash.tree import DraftTree, Walk, ancestor_mask, build_tree, chain, walk

if TYPE_CHECKING:
    from vllm_dflash.hf.modeling import DFlashDraftModel


@dataclass(frozen=True)
class SpecGenerateOutput:
    """What was generated, and how."""

    sequences: torch.Tensor  # [B, P+n]: the prompts as they were given, generated ids, padding behind an early stop
    acceptance_lengths_by_row: list[list[int]]  # tokens that each round added to a row, bonus token included
    prefill_seconds: float  # until every sequence has its first token
    decode_seconds: float  # all rounds

    @property
    def acceptance_lengths(self) -> list[int]:
        """Of all rounds, one row after the other."""
        return [length for row in self.acceptance_lengths_by_row for length in row]


@dataclass(frozen=True)
class Limits:
    """Where a sequence ends: at the first stop token, which is kept, or after so many tokens."""

    max_new_tokens: int
    stop_token_ids: frozenset[int]

    def cut(self, tokens: list[int], num_before: int) -> tuple[list[int], bool]:
        """What is kept of tokens that follow `num_before` generated ones, and whether the sequence has ended."""
        kept = tokens[: self.max_new_tokens - num_before]
        for index, token in enumerate(kept):
            if token in self.stop_token_ids:
                return kept[: index + 1], True
        return kept, num_before + len(kept) == self.max_new_tokens


@dataclass(frozen=True)
class ContextRows:
    """Features of rows that the target ran since the last round. Rows that do not count are padding."""

    features: torch.Tensor  # [B, T, F*H]
    positions: torch.Tensor  # [B, T]
    is_real: torch.Tensor  # [B, T] bool


class Sequences:
    """Each sequence's text, and how much of it the target has seen: all but its last token, the anchor."""

    def __init__(self, prompts: Prompts, first_tokens: torch.Tensor, limits: Limits) -> None:
        self.limits = limits
        self.prompt_lengths = prompts.lengths
        self.tokens = prompts.tokens()
        self.lengths = torch.tensor(prompts.lengths, device=first_tokens.device)  # [B] context rows
        self.longest = max(prompts.lengths)
        self.anchors = first_tokens  # [B]
        self.acceptance_lengths: list[list[int]] = [[] for _ in self.tokens]
        self.is_active = [self._add(row, [token]) for row, token in enumerate(first_tokens.tolist())]
        self.active = torch.tensor(self.is_active, device=first_tokens.device)  # [B] bool

    def new_tokens(self, row: int) -> list[int]:
        return self.tokens[row][self.prompt_lengths[row] :]

    @property
    def all_ended(self) -> bool:
        return not any(self.is_active)

    def append(
        self,
        accepted: torch.Tensor,  # [B, D]; the first `num_accepted` count
        walked: Walk,
    ) -> None:
        """Add what a round gave to every sequence that has not ended. The one place that waits for the device."""
        self.lengths = self.lengths + (walked.num_accepted + 1) * self.active
        self.anchors = torch.where(self.active, walked.next_token_ids, self.anchors)
        rows = torch.cat((accepted, walked.num_accepted[:, None], walked.next_token_ids[:, None]), dim=1).tolist()
        for row, (*ids, count, bonus) in enumerate(rows):
            if self.is_active[row]:
                self.longest = max(self.longest, len(self.tokens[row]) + count)
                self.acceptance_lengths[row].append(count + 1)
                self.is_active[row] = self._add(row, [*ids[:count], bonus])
        self.active = torch.tensor(self.is_active, device=self.active.device)

    def _add(self, row: int, tokens: list[int]) -> bool:
        """Add to a sequence's text what is kept of these; returns whether it goes on."""
        kept, ended = self.limits.cut(tokens, len(self.tokens[row]) - self.prompt_lengths[row])
        self.tokens[row] += kept
        return not ended


def spec_generate(
    draft: DFlashDraftModel,
    target: nn.Module,
    input_ids: torch.Tensor,  # [B, P]
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_token_ids: list[int] | None = None,
    attention_mask: torch.Tensor | None = None,  # [B, P]; 0: padding, on either side
    tree_budget: int | None = None,
    streamer: Any = None,
) -> SpecGenerateOutput:
    """Generate up to `max_new_tokens` tokens a sequence, each ending at its first stop token (which is kept).

    At temperature 0 the text equals greedy decoding of the target. Above, every emitted token is a sample of the
    target's distribution: a draft is kept exactly when the target's own sample equals it. `tree_budget` = N verifies
    the N likeliest continuations instead of a chain of K tokens. `streamer` is told tokens as they come, as in
    `generate`. Raises ValueError for a prompt, a limit or a pair that cannot be.
    """
    prompts = read_prompts(input_ids, attention_mask)
    _check(max_new_tokens, tree_budget, prompts, streamer)
    check_pair(draft, target, prompts)
    limits = Limits(max_new_tokens, frozenset(stop_token_ids or ()))
    with TargetFeatures(target, draft.target_layer_ids) as features:
        started = time.perf_counter()
        run = Generation(draft, target, features, prompts, limits, sampling or Sampling(), tree_budget)
        said = Said(streamer, input_ids, run.sequences)
        prefilled = time.perf_counter()
        while not run.sequences.all_ended:
            run.round()
            said.update()
        said.end()
    seconds = (prefilled - started, time.perf_counter() - prefilled)
    return SpecGenerateOutput(
        joined(input_ids, run.sequences, padding_id(target)), run.sequences.acceptance_lengths, *seconds
    )


class Generation:
    """One batch on its way: what the target and the drafter remember, and one round after the other."""

    def __init__(
        self,
        draft: DFlashDraftModel,
        target: nn.Module,
        features: TargetFeatures,
        prompts: Prompts,
        limits: Limits,
        sampling: Sampling,
        tree_budget: int | None,
    ) -> None:
        self.draft, self.target, self.features, self.sampling = draft, target, features, sampling
        self.tree_budget, self.num_depths = tree_budget, draft.block_size - 1
        self.masks = TargetMasks(target)
        widest = max(draft.block_size, 1 + (tree_budget or 0))
        capacity = max(prompts.lengths) + limits.max_new_tokens + draft.block_size + widest + 1
        self.target_cache = SlotCache(target.config.get_text_config(decoder=True).num_hidden_layers, capacity)
        self.draft_cache = SlotCache(draft.dflash.num_hidden_layers, capacity)
        first_tokens = self._prefill(prompts)
        self.sequences = Sequences(prompts, first_tokens, limits)

    def _prefill(self, prompts: Prompts) -> torch.Tensor:
        """The target over the prompts; the first token of each, [B]."""
        positions, width = prompts.positions, prompts.token_ids.shape[1]
        self.target_cache.place(torch.where(prompts.is_real, positions, self.target_cache.spare_slot), width)
        visible = prompt_visibility(positions)
        logits = self._run_target(prompts.token_ids, positions, visible, None, logits_to_keep=1)  # [B, 1, V]
        self.context = ContextRows(self.features.take(), positions, prompts.is_real)
        return self.sampling.choose(logits[:, -1])

    def round(self) -> None:
        """Draft, verify, keep."""
        tree = draft_tree(self.draft, self.target, self.sequences, self.context, self.draft_cache, self.tree_budget)
        ancestors = ancestor_mask(tree, self.num_depths)
        logits = self._verify(tree, ancestors)  # [B, 1+N, V]
        walked = walk(tree, ancestors, self.sampling.choose(logits), self.num_depths)
        self._keep(tree, walked)

    def _verify(
        self,
        tree: DraftTree,
        ancestors: torch.Tensor,  # [B, 1+N, 1+N] bool
    ) -> torch.Tensor:
        """One target forward over anchors and candidates: logits [B, 1+N, V]."""
        sequences = self.sequences
        rows = torch.cat((sequences.anchors[:, None], tree.token_ids), dim=1)
        depths = torch.cat((torch.zeros_like(rows[:, :1]), tree.depths), dim=1)
        positions = sequences.lengths[:, None] + depths
        num_slots = sequences.longest + rows.shape[1]
        visible = candidate_visibility(sequences.lengths, ancestors, num_slots)
        self.target_cache.place(sequences.lengths[:, None] + _counting(rows), num_slots)
        return self._run_target(rows, positions, visible, sequences.lengths)

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

    def _keep(self, tree: DraftTree, walked: Walk) -> None:
        """The accepted way becomes context and text, the rest is forgotten."""
        sequences = self.sequences
        way = torch.cat((torch.zeros_like(walked.nodes[:, :1]), walked.nodes + 1), dim=1)  # [B, 1+D] rows
        is_real = (_counting(way) <= walked.num_accepted[:, None]) & sequences.active[:, None]
        way = way.clamp(max=tree.token_ids.shape[1])
        positions = sequences.lengths[:, None] + _counting(way)
        if self.tree_budget is not None:  # a chain's rows lie together already
            spare = self.target_cache.spare_slot
            sources = torch.where(is_real, sequences.lengths[:, None] + way, spare)
            self.target_cache.move(sources, torch.where(is_real, positions, spare))
        accepted = tree.token_ids.gather(1, walked.nodes.clamp(min=0))
        features = self.features.take()
        sequences.append(accepted, walked)
        most = max(lengths[-1] for lengths in sequences.acceptance_lengths if lengths)
        way = way[:, :most, None].expand(-1, -1, features.shape[2])
        self.context = ContextRows(features.gather(1, way), positions[:, :most], is_real[:, :most])


def draft_tree(
    draft: DFlashDraftModel,
    target: nn.Module,
    sequences: Sequences,
    context: ContextRows,
    cache: SlotCache,  # K/V of all earlier context rows
    tree_budget: int | None,
) -> DraftTree:
    """One forward of the drafter over [anchor, mask x K]: a chain of its likeliest tokens, or a tree of N nodes."""
    block = torch.full((len(sequences.tokens), draft.block_size), draft.mask_token_id, device=context.positions.device)
    block[:, 0] = sequences.anchors
    block_slots = sequences.lengths[:, None] + _counting(block)
    num_slots = sequences.longest + draft.block_size
    context_slots = torch.where(context.is_real, context.positions, cache.spare_slot)
    cache.place(torch.cat((context_slots, block_slots), dim=1), num_slots)
    visible = None  # [B, 1, 1, S]; not needed where no other sequence is longer
    if len(sequences.tokens) > 1:
        visible = (torch.arange(num_slots, device=block.device) <= block_slots[:, -1:])[:, None, None]
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


class Said:
    """What a streamer has been told of the one sequence."""

    def __init__(self, streamer: Any, input_ids: torch.Tensor, sequences: Sequences) -> None:
        self.streamer, self.sequences, self.told = streamer, sequences, 0
        if streamer is not None:
            streamer.put(input_ids.cpu())
        self.update()

    def update(self) -> None:
        if self.streamer is not None:
            new = self.sequences.new_tokens(0)
            if len(new) > self.told:
                self.streamer.put(torch.tensor(new[self.told :]))
            self.told = len(new)

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()


def joined(
    input_ids: torch.Tensor,  # [B, P]
    sequences: Sequences,
    padding: int,
) -> torch.Tensor:
    """Prompts as given and what was generated, [B, P+n], as `generate` returns them."""
    new = [sequences.new_tokens(row) for row in range(len(sequences.tokens))]
    longest = max(map(len, new))
    padded = [ids + [padding] * (longest - len(ids)) for ids in new]
    return torch.cat((input_ids, input_ids.new_tensor(padded)), dim=1)


def padding_id(target: nn.Module) -> int:
    """What stands behind a sequence that ended before others: the target's own choice."""
    config = target.generation_config
    ends = config.eos_token_id
    if config.pad_token_id is not None:
        return config.pad_token_id
    return 0 if ends is None else ends if isinstance(ends, int) else ends[0]


def _counting(
    rows: torch.Tensor,  # [B, N]
) -> torch.Tensor:
    """0, 1, ..., N-1."""
    return torch.arange(rows.shape[1], device=rows.device)


def _check(max_new_tokens: int, tree_budget: int | None, prompts: Prompts, streamer: Any) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    if tree_budget is not None and (not isinstance(tree_budget, int) or tree_budget < 1):
        raise ValueError(f"tree_budget must be None or a number of nodes of at least 1, found {tree_budget!r}")
    if streamer is not None and len(prompts.lengths) > 1:
        raise ValueError(f"a streamer takes one sequence, and input_ids has {len(prompts.lengths)}")
