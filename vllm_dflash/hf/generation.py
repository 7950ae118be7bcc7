# SPDX-License-Identifier: Apache-2.0
"""DFlash speculative decoding on Transformers, as plainly as it can be said (paper, section 3; Algorithm 1).

One round: draft a block, verify it in one target forward, keep the longest way that the target itself would have gone
and the target's next token after it. What comes out is the target's own text. What is verified is a chain of tokens, or
a tree of the likeliest continuations (`vllm_dflash.tree`); a chain is a tree of one branch.

Letters: B sequences, P tokens of the longest prompt, n of the longest answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from vllm_dflash.hf.attention import grouped_heads
from vllm_dflash.hf.budget import RoundCosts
from vllm_dflash.hf.calibration import Calibration
from vllm_dflash.hf.graphs import Workspace, WorkspaceKey, padded_slots
from vllm_dflash.hf.options import Options, check_batch, check_calibration
from vllm_dflash.hf.processors import ProcessedChoice
from vllm_dflash.hf.prompts import Prompts, check_pair, read_prompts
from vllm_dflash.hf.round import Round
from vllm_dflash.hf.sequences import Said, Sequences, padding_id
from vllm_dflash.hf.state import RoundState, Window
from vllm_dflash.hf.verification import check_attention
from vllm_dflash.options import AUTO

if TYPE_CHECKING:
    from vllm_dflash.hf.modeling import DFlashDraftModel


@dataclass(frozen=True)
class SpecGenerateOutput:
    """What was generated, and how."""

    sequences: torch.Tensor  # [B, P+n]: the prompts as they were given, generated ids, padding behind an early stop
    acceptance_lengths_by_row: list[list[int]]  # what each round accepted, and the bonus token, also behind an end
    prefill_seconds: float  # until every sequence has its first token
    decode_seconds: float  # all rounds
    budgets: list[int]  # nodes that each round verified; empty unless the budget was "auto"
    calibration: Calibration  # what was learned of the drafter

    @property
    def acceptance_lengths(self) -> list[int]:
        """Of all rounds, one row after the other."""
        return [length for row in self.acceptance_lengths_by_row for length in row]


def spec_generate(
    model: DFlashDraftModel,
    target: nn.Module,
    input_ids: torch.Tensor,  # [B, P]
    attention_mask: torch.Tensor | None,  # [B, P]; 0: padding, on either side
    options: Options,
) -> SpecGenerateOutput:
    """Generate with `target`, drafting with `model`. Every text is the target's own, or a sample of its distribution.

    Raises ValueError for a prompt, an option or a pair that cannot be.
    """
    prompts = read_prompts(input_ids, attention_mask)
    check_batch(options, input_ids)
    check_pair(model, target, prompts)
    check_calibration(options.calibration, model.block_size - 1)
    check_attention(target, len(prompts.lengths), options.tree_budget is not None, options.compile)
    started = time.perf_counter()
    run = _prepared(model, target, prompts, options)
    with torch.cuda.device_of(input_ids), run.round.features, grouped_heads(target):
        state = run.round.prefill(prompts, options.calibration)
        sequences = Sequences(prompts, state.anchors.tolist(), options.limits)
        if run.round.processed is not None:
            run.round.processed.sequences = sequences
        said = Said(options.streamer, input_ids, sequences)
        prefilled = time.perf_counter()
        reports = run.rounds(state, sequences)
        while not sequences.all_ended:
            sequences.append(next(reports))
            said.update()
        said.end()
    return SpecGenerateOutput(
        sequences.joined(input_ids, padding_id(target)),
        sequences.acceptance_lengths,
        prefilled - started,
        time.perf_counter() - prefilled,
        run.budgets,
        (run.calibration or state.calibration).clone(),
    )


def _prepared(model: DFlashDraftModel, target: nn.Module, prompts: Prompts, options: Options) -> Rounds:
    """A round with room for these texts, and what runs it again and again."""
    rule, num_sequences = options.rule, len(prompts.lengths)
    costs = None
    if options.tree_budget == AUTO:
        costs = model.costs_with(target, num_sequences, options.compile)
    behind = 2 * model.block_size + rule.widest(model.block_size)  # slots of rounds that go on beyond the limit
    capacity = max(prompts.lengths) + options.limits.max_new_tokens + behind + 1
    if not options.compile:
        one_round = Round(model, target, rule, capacity)
        if options.logits_processor:
            one_round.processed = ProcessedChoice(options.logits_processor, options.sampling, prompts)
        return Rounds(one_round, costs)
    key = WorkspaceKey(target, (target.dtype, target.device), num_sequences, rule)
    if model.workspace is None or not model.workspace.fits(key, capacity):
        model.workspace = None  # its memory is free before the new one's is taken
        model.workspace = Workspace(key, Round(model, target, rule, padded_slots(capacity) + 1))
    return GraphedRounds(model.workspace, costs)


class Rounds:
    """One round after the other, for one call. The host reads each report before it starts the next round."""

    def __init__(self, one_round: Round, costs: RoundCosts | None) -> None:
        self.round, self.costs = one_round, costs
        self.budgets: list[int] = []
        self.calibration: Calibration | None = None

    def rounds(self, state: RoundState, sequences: Sequences) -> Iterator[list[list[int]]]:
        """Their reports, each of which the caller adds to `sequences` before it asks on."""
        while True:
            state, rows = self._one(state, sequences)
            most = 1 + max(row[-2] for row in rows)
            state = state.with_context(most)
            yield rows

    def _one(self, state: RoundState, sequences: Sequences) -> tuple[RoundState, list[list[int]]]:
        begun = time.perf_counter()
        active = torch.tensor(sequences.is_active, device=state.anchors.device)
        budget = None
        if self.costs is not None:
            budget = self._choose
            num_nodes = self.costs.worth_drafting(self.budgets[-1] if self.budgets else None)
            self.round.rule = replace(self.round.rule, num_nodes=num_nodes)
        state, report = self.round(state, active, Window(sequences.longest), budget)
        rows: list[list[int]] = report.tokens.tolist()
        self.calibration = state.calibration
        if self.costs is not None:
            self.costs.record(self.budgets[-1], time.perf_counter() - begun)
        return state, rows

    def _choose(
        self,
        expected: torch.Tensor,  # [budgets]
    ) -> int:
        """The budget of this very tree."""
        assert self.costs is not None
        assert self.round.rule.num_nodes is not None
        self.budgets.append(self.costs.choose(expected.tolist(), self.round.rule.num_nodes))
        return self.budgets[-1]


class GraphedRounds(Rounds):
    """The same with CUDA graphs. The first round, whose context is the whole prompt, runs without."""

    def __init__(self, workspace: Workspace, costs: RoundCosts | None) -> None:
        super().__init__(workspace.round, costs)
        self.workspace = workspace

    def rounds(self, state: RoundState, sequences: Sequences) -> Iterator[list[list[int]]]:
        """Reports of one round after the other; the device is a round ahead of them."""
        active = torch.tensor(sequences.is_active, device=state.anchors.device)
        budget = None if self.costs is None else self._choose
        state, report = self.round(state, active, Window(sequences.longest), budget)
        yield report.tokens.tolist()
        for rows in self.workspace.rounds(state, sequences, self.costs, self.budgets):
            assert self.workspace.state is not None
            self.calibration = self.workspace.state.calibration
            yield rows
