# SPDX-License-Identifier: Apache-2.0
"""Drafted trees and what the target accepted of them, step by step, for models of other loads and machines."""

from __future__ import annotations

from typing import Any

from gpu.decode.batch import run_batch
from gpu.engine_inside import drafter_of, model_runner
from gpu.names import Record


class TreeRecorder:
    """Looks into an engine of draft trees after each of its steps: a verification is of the step before's trees."""

    def __init__(self, llm: Any) -> None:
        self.speculator = drafter_of(model_runner(llm))
        self.drafting = self.speculator.trees
        self.records: list[Record] = []
        self.num_odd = 0
        self._last: dict[int, tuple[list[float], list[int]]] = {}  # by row of the state: likelihoods, parents

    def step(self) -> None:
        """Pair this step's ways with the trees that they are ways through, and remember the next trees."""
        store, rows = self.drafting.store, self.drafting._rows
        num_depths = store.way.shape[1]
        state_rows = [row for row in self.speculator.idx_mapping.tolist() if row >= 0]
        for place, state_row in enumerate(state_rows):
            if state_row in self._last:
                num_accepted = num_depths - int(rows.num_rejected[place])
                way = store.way[state_row, :num_accepted].tolist()
                self._note(*self._last[state_row], way)
        self._last = {row: (store.trees.probs[row].tolist(), store.trees.parents[row].tolist()) for row in state_rows}

    def _note(self, likelihoods: list[float], parents: list[int], way: list[int]) -> None:
        is_way = [parents[row - 1] + 1 for row in way] == [0, *way][: len(way)]
        if not is_way:  # of another step's tree: nothing that could be counted
            self.num_odd += 1
            return
        nodes = [row - 1 for row in way]
        self.records.append({"likelihoods": [round(p, 5) for p in likelihoods], "accepted": nodes})


def record_trees(llm: Any, request: Record) -> Record:
    """Run a batch to its end and record its trees."""
    recorder = TreeRecorder(llm)
    run_batch(llm, request["prompts"], request["max_tokens"], request["temperature"], recorder.step)
    return {"records": recorder.records, "odd": recorder.num_odd}


def measured_costs(llm: Any) -> Record:
    """What an engine whose trees follow the load has measured of its steps; nothing where it assumes them."""
    costs = model_runner(llm).adaptive_verification.costs
    if costs is None or costs.trees_ms is None:
        return {}
    return {
        "verify_ms": [float(ms) for ms in costs.verify_ms],
        "draft_ms": [float(ms) for ms in costs.draft_ms],
        "context_ms": float(costs.context_ms),
        "attention_ms": [float(ms) for ms in costs.attention_ms],
        "profiled_context": costs.profiled_context,
        "trees_ms": [float(ms) for ms in costs.trees_ms],
    }
