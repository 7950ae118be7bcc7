# SPDX-License-Identifier: Apache-2.0
"""DFlash speculative decoding on Transformers, as plainly as it can be said (paper, section 3; Algorithm 1).

One round: draft a block, verify it in one target forward, keep the longest way that the target itself would have gone
and the target's next token after it. What comes out is the target's own text. What is verified is a chain of the
likeliest tokens, or a tree of the likeliest continuations (`vllm_dflash.tree`); a chain is a tree of one branch.

Letters: B sequences, P tokens of the longest prompt, n of the longest answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import LogitsProcessorList

from vllm_dflash.hf.attention import grouped_heads
from vllm_dflash.hf.choosing import Sampling
from vllm_dflash.hf.graphs import Workspace, WorkspaceKey, padded_slots
from vllm_dflash.hf.processors import ProcessedChoice
from vllm_dflash.hf.prompts import Prompts, check_pair, read_prompts
from vllm_dflash.hf.round import Round, RoundState
from vllm_dflash.hf.sequences import Limits, Said, Sequences, padding_id

if TYPE_CHECKING:
    from vllm_dflash.hf.modeling import DFlashDraftModel


Rounds = Callable[[RoundState, Sequences], Iterator[list[list[int]]]]


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
    compile: bool = False,
    logits_processor: LogitsProcessorList | None = None,
) -> SpecGenerateOutput:
    """Generate up to `max_new_tokens` tokens a sequence, each ending at its first stop token (which is kept).

    At temperature 0 the text equals greedy decoding of the target. Above, every emitted token is a sample of the
    target's distribution: a draft is kept exactly when the target's own sample equals it. `tree_budget` = N verifies
    the N likeliest continuations instead of a chain of K tokens. `streamer` is told tokens as they come, as in
    `generate`. `compile` makes a round one CUDA graph; graphs and caches stay with the drafter for the next call like
    this one. `logits_processor` as in `generate`, shown one sequence at a time. Raises ValueError for a prompt, a limit or a pair that cannot be.
    """
    prompts = read_prompts(input_ids, attention_mask)
    _check(max_new_tokens, tree_budget, prompts, streamer)
    if compile:
        check_device(input_ids)
        _check_no_processors(logits_processor)
    check_pair(draft, target, prompts)
    sampling = sampling or Sampling()
    started = time.perf_counter()
    one_round, decode = _prepared(draft, target, prompts, max_new_tokens, sampling, tree_budget, compile)
    if logits_processor:
        one_round.processed = ProcessedChoice(logits_processor, sampling, prompts)
    with one_round.features, grouped_heads(target):
        state = one_round.prefill(prompts)
        limits = Limits(max_new_tokens, frozenset(stop_token_ids or ()))
        sequences = Sequences(prompts, state.anchors.tolist(), limits)
        if one_round.processed is not None:
            one_round.processed.sequences = sequences
        said = Said(streamer, input_ids, sequences)
        prefilled = time.perf_counter()
        reports = decode(state, sequences)
        while not sequences.all_ended:
            sequences.append(next(reports))
            said.update()
        said.end()
    seconds = (prefilled - started, time.perf_counter() - prefilled)
    return SpecGenerateOutput(sequences.joined(input_ids, padding_id(target)), sequences.acceptance_lengths, *seconds)


def _prepared(
    draft: DFlashDraftModel,
    target: nn.Module,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: Sampling,
    tree_budget: int | None,
    compile: bool,
) -> tuple[Round, Rounds]:
    """A round with room for these texts, and what runs it again and again."""
    longest_round = draft.block_size
    widest = max(longest_round, 1 + (tree_budget or 0))
    capacity = max(prompts.lengths) + max_new_tokens + 2 * longest_round + widest + 1
    if not compile:
        one_round = Round(draft, target, sampling, tree_budget, capacity)
        return one_round, lambda state, sequences: eager_rounds(one_round, state, sequences)
    key = WorkspaceKey(target, len(prompts.lengths), sampling, tree_budget)
    workspace = draft.workspace
    if workspace is None or not workspace.fits(key, capacity):
        draft.workspace = None  # its memory is free before the new one's is taken
        workspace = draft.workspace = Workspace(
            key, Round(draft, target, sampling, tree_budget, padded_slots(capacity) + 1)
        )
    return workspace.round, lambda state, sequences: graphed_rounds(workspace, state, sequences)


def eager_rounds(one_round: Round, state: RoundState, sequences: Sequences) -> Iterator[list[list[int]]]:
    """Reports of one round after the other, each of which the caller adds to `sequences` before it asks on."""
    num_sequences = len(sequences.is_active)
    while True:
        active = torch.tensor(sequences.is_active, device=state.anchors.device)
        state, report = one_round(state, active, one_round.window(sequences.longest, num_sequences))
        rows = report.tolist()
        most = 1 + max(row[-2] for row in rows)
        state = replace(state, context=state.context.first(most))
        yield rows


def graphed_rounds(workspace: Workspace, state: RoundState, sequences: Sequences) -> Iterator[list[list[int]]]:
    """The same with CUDA graphs. The first round, whose context is the whole prompt, runs without."""
    one_round = workspace.round
    active = torch.tensor(sequences.is_active, device=state.anchors.device)
    state, report = one_round(state, active, one_round.window(sequences.longest, len(sequences.is_active)))
    yield report.tolist()
    yield from workspace.rounds(state, sequences)


def _check(max_new_tokens: int, tree_budget: int | None, prompts: Prompts, streamer: Any) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    if tree_budget is not None and (not isinstance(tree_budget, int) or tree_budget < 1):
        raise ValueError(f"tree_budget must be None or a number of nodes of at least 1, found {tree_budget!r}")
    if streamer is not None and len(prompts.lengths) > 1:
        raise ValueError(f"a streamer takes one sequence, and input_ids has {len(prompts.lengths)}")


def _check_no_processors(logits_processor: LogitsProcessorList | None) -> None:
    if logits_processor:
        names = [type(one).__name__ for one in logits_processor]
        raise ValueError(
            f"compile=True runs rounds without the host, and logits_processor = {names} needs each text there"
        )


def check_device(input_ids: torch.Tensor) -> None:
    """Raises ValueError naming the device where there are no CUDA graphs."""
    if not input_ids.is_cuda:
        raise ValueError(f"compile=True makes CUDA graphs, and input_ids is on {input_ids.device}")
