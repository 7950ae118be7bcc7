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

from vllm_dflash.hf.round import Round, RoundState, Window
from vllm_dflash.hf.sequences import Sequences

if TYPE_CHECKING:
    from vllm_dflash.hf.choosing import Sampling

SMALLEST_WINDOW = 256

Run = Callable[[], torch.Tensor]  # a round on fixed memory; returns its report


@dataclass(frozen=True)
class WorkspaceKey:
    """What a captured round depends on."""

    target: nn.Module
    num_sequences: int
    sampling: Sampling
    tree_budget: int | None


class Workspace:
    """A round with its caches and graphs, kept from call to call."""

    def __init__(self, key: WorkspaceKey, one_round: Round) -> None:
        self.key, self.round = key, one_round
        self.state: RoundState | None = None
        self.is_active = [True] * key.num_sequences
        self.active = torch.tensor(self.is_active, device=key.target.device)
        self.replays: dict[int, Run] = {}  # by number of slots

    def fits(self, key: WorkspaceKey, capacity: int) -> bool:
        """Can a call of this kind use it?"""
        return self.key == key and self.round.target_cache.plan.capacity >= capacity

    def rounds(self, state: RoundState, sequences: Sequences) -> Iterator[list[list[int]]]:
        """Reports of one round after the other, each of which the caller adds to `sequences` before it asks on."""
        self._load(state)
        unread: HostCopy | None = None
        while True:
            not_yet_told = self.round.num_depths + 1 if unread else 0
            report = self._launch(sequences.longest + not_yet_told + self.round.widest, sequences.is_active)
            launched = HostCopy(report)
            if unread is not None:
                yield unread.rows()
            unread = launched

    def _launch(self, num_slots: int, is_active: list[bool]) -> torch.Tensor:
        if is_active != self.is_active:
            self.is_active = list(is_active)
            self.active.copy_(torch.tensor(is_active), non_blocking=True)
        size = padded_slots(num_slots)
        if size not in self.replays:
            window = Window(size, size, is_exact=False)
            self.replays[size] = capture(
                lambda: self._stepped(window), lambda: self._advance(window), self.key.sampling.generator
            )
        return self.replays[size]()

    def _stepped(self, window: Window) -> tuple[RoundState, torch.Tensor]:
        assert self.state is not None
        return self.round(self.state, self.active, window)

    def _advance(self, window: Window) -> torch.Tensor:
        """One round; what it leads to becomes the state."""
        state, report = self._stepped(window)
        self._load(state)
        return report

    def _load(self, state: RoundState) -> None:
        """Make this the state that the next round reads."""
        if self.state is None:
            self.state = state.clone()
        else:
            self.state.copy_(state)


class HostCopy:
    """A report on its way to the host."""

    def __init__(
        self,
        report: torch.Tensor,  # [B, D+2]
    ) -> None:
        self.copy = report.to("cpu", non_blocking=True)
        self.arrived = torch.cuda.Event() if report.is_cuda else None
        if self.arrived is not None:
            self.arrived.record()

    def rows(self) -> list[list[int]]:
        """Wait for it."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.copy.tolist()


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

    def replay() -> torch.Tensor:
        graph.replay()
        return report

    return replay
