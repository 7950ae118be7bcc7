# SPDX-License-Identifier: Apache-2.0
"""Whole rounds as CUDA graphs: `spec_generate(compile=True)`.

A graph's tensors never move, so a round reads its state from fixed memory and writes the next one there. How much of
the caches attention sees is fixed too: there is one graph for each of a few sizes. The host runs one round ahead of
what it has read, so that the device never waits for it; a text that turns out to have ended has then been drafted for
once more, which nobody reads.

Letters: B sequences, D depths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from vllm_dflash.hf.round import Round
from vllm_dflash.hf.sequences import Sequences
from vllm_dflash.hf.state import RoundReport, RoundState, Window

if TYPE_CHECKING:
    from vllm_dflash.hf.budget import RoundCosts
    from vllm_dflash.hf.drafting import DraftRule

SMALLEST_WINDOW = 256

Run = Callable[[], RoundReport]  # a round on fixed memory


@dataclass(frozen=True)
class WorkspaceKey:
    """What a captured round depends on."""

    target: nn.Module
    memory: tuple[torch.dtype, torch.device]  # where the target was, which may have been moved since
    num_sequences: int
    rule: DraftRule


class Workspace:
    """A round with its caches and graphs, kept from call to call."""

    def __init__(self, key: WorkspaceKey, one_round: Round) -> None:
        self.key, self.round = key, one_round
        self.state: RoundState | None = None
        self.is_active = [True] * key.num_sequences
        self.active = torch.tensor(self.is_active, device=key.target.device)
        self.replays: dict[tuple[int, int | None], Run] = {}  # by number of slots, and budget

    def fits(self, key: WorkspaceKey, capacity: int) -> bool:
        """Can a call of this kind use it?"""
        return self.key == key and self.round.target_cache.plan.capacity >= capacity

    def rounds(
        self, state: RoundState, sequences: Sequences, costs: RoundCosts | None, budgets: list[int]
    ) -> Iterator[list[list[int]]]:
        """Reports of one round after the other, each of which the caller adds to `sequences` before it asks on.

        With `costs`, a round's budget is chosen by what the latest read one expected, and noted in `budgets`.
        """
        self._load(state)
        unread: HostCopy | None = None
        expected = [0.0] * len(costs.budgets) if costs is not None else []
        while True:
            budget = costs.choose(expected, costs.budgets[-1]) if costs is not None else None
            not_yet_told = self.round.num_depths + 1 if unread else 0
            launched = self._launch(sequences.longest + not_yet_told + self.round.widest, sequences.is_active, budget)
            if unread is not None:
                rows = unread.rows()
                if costs is not None:
                    costs.record(budgets[-1], unread.seconds())
                    expected = unread.expected()
                yield rows
            if budget is not None:
                budgets.append(budget)
            unread = launched

    def _launch(self, num_slots: int, is_active: list[bool], budget: int | None) -> HostCopy:
        if is_active != self.is_active:
            self.is_active = list(is_active)
            self.active.copy_(torch.tensor(is_active), non_blocking=True)
        key = (padded_slots(num_slots), budget)
        if key not in self.replays:
            window = Window(0, size=key[0])
            self.replays[key] = capture(
                lambda: self._stepped(window, budget),
                lambda: self._advance(window, budget),
                self.key.rule.sampling.generator,
            )
        return HostCopy(self.replays[key])

    def _stepped(self, window: Window, budget: int | None) -> tuple[RoundState, RoundReport]:
        assert self.state is not None
        return self.round(self.state, self.active, window, budget)

    def _advance(self, window: Window, budget: int | None) -> RoundReport:
        """One round; what it leads to becomes the state."""
        state, report = self._stepped(window, budget)
        self._load(state)
        return report

    def _load(self, state: RoundState) -> None:
        """Make this the state that the next round reads."""
        if self.state is None:
            self.state = state.clone()
        else:
            self.state.copy_(state)


class HostCopy:
    """A round on the device, and its report on the way to the host."""

    def __init__(self, run: Run) -> None:
        self.begun = mark()
        report = run()
        self.tokens = report.tokens.to("cpu", non_blocking=True)  # [B, D+2]
        self._expected = None if report.expected is None else report.expected.to("cpu", non_blocking=True)
        self.ended = mark()

    def rows(self) -> list[list[int]]:
        """Wait for it: what each sequence got."""
        self.ended.synchronize()
        return self.tokens.tolist()

    def expected(self) -> list[float]:
        """`RoundReport.expected`, after `rows`."""
        assert self._expected is not None
        return self._expected.tolist()

    def seconds(self) -> float:
        """What it took the device, after `rows`."""
        return self.begun.elapsed_time(self.ended) / 1000.0


def mark() -> torch.cuda.Event:
    """This place in the device's work."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def padded_slots(num_slots: int) -> int:
    """The window that serves so many slots: few sizes, none more than a quarter too large beyond the smallest."""
    step = max(SMALLEST_WINDOW, 2 ** (num_slots.bit_length() - 1) // 4)
    return -(-num_slots // step) * step


def capture(warm_up: Callable[[], object], run: Run, generator: torch.Generator | None) -> Run:
    """`run` as a CUDA graph: a function that replays it and returns the same report tensor every time.

    `warm_up` does the same and may be repeated; it is what really runs here, so that libraries find their memory before
    the capture. Random numbers that it takes are given back. Raises RuntimeError where a model cannot be captured.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA graphs need a CUDA device")
    random = generator or torch.cuda.default_generators[torch.cuda.current_device()]
    random_state = random.get_state()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warm_up()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    try:
        with torch.cuda.graph(graph):
            report = run()
    except RuntimeError as error:
        raise RuntimeError(f"compile=True: this pair's round cannot be a CUDA graph ({error}); leave it out") from error
    random.set_state(random_state)

    def replay() -> RoundReport:
        graph.replay()
        return report

    return replay
