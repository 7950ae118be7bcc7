# SPDX-License-Identifier: Apache-2.0
"""Context that is injected later: the same rows to the same slots, in time."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")
import torch

from vllm_dflash.proposer.backlog import ContextBacklog
from vllm_dflash.proposer.step import ContextRows
from vllm_dflash.proposer.tapped_states import TappedStates

CPU = torch.device("cpu")
WIDTH = 3


class Caches:
    """Two layers' caches of 1000 slots, in two groups: the features that were written to a slot, and its position."""

    def __init__(self, smallest_window: int | None = None, max_rows: int = 1000) -> None:
        self.slots = torch.full((2, 1000, 1 + 2 * WIDTH), -1.0)
        self.num_injections = 0
        self.backlog = ContextBacklog(2, 2 * WIDTH, smallest_window, max_rows, torch.float32, CPU, self.inject)

    def inject(self, features: torch.Tensor, rows: ContextRows) -> None:
        self.num_injections += 1
        for group in range(2):
            self.slots[group, rows.slot_mappings[group], 0] = rows.positions.float()
            self.slots[group, rows.slot_mappings[group], 1:] = features

    def step(self, position: int, num_reqs: int, num_rows: int | None = None) -> bool:
        """Requests at this position, in memory that the next step writes again."""
        num_rows = num_rows or num_reqs
        slots = position * num_reqs + torch.arange(num_rows)
        states = [torch.full((num_rows + 5, WIDTH), 10.0 * position + layer) for layer in range(2)]
        rows = ContextRows(torch.full((num_rows,), position), torch.stack([slots, 999 - slots]))
        is_kept = self.backlog.keep(TappedStates(states, num_rows), rows, num_reqs)
        for memory in (*states, rows.positions, rows.slot_mappings):
            memory.fill_(777)
        return is_kept

    def written(self) -> list[int]:
        """Positions of the first group's slots."""
        return [int(row[0]) for row in self.slots[0] if row[0] >= 0]


def test_rows_are_injected_together() -> None:
    caches = Caches()
    assert all([caches.step(position, num_reqs=2) for position in (5, 6, 7)])
    assert caches.written() == [] and caches.num_injections == 0
    caches.backlog.inject()
    assert caches.written() == [5, 5, 6, 6, 7, 7] and caches.num_injections == 1
    assert caches.slots[0, 12:14].tolist() == [[6, 60, 60, 60, 61, 61, 61]] * 2
    assert caches.slots[1, 999 - 12].tolist() == [6, 60, 60, 60, 61, 61, 61]
    caches.backlog.inject()
    assert caches.num_injections == 1
    assert caches.step(8, num_reqs=2)
    caches.backlog.inject()
    assert caches.written() == [5, 5, 6, 6, 7, 7, 8, 8]


def test_sixteen_steps_at_most() -> None:
    caches = Caches()
    assert all([caches.step(position, num_reqs=1) for position in range(16)])
    assert caches.written() == []
    assert caches.step(16, num_reqs=1)
    assert caches.written() == list(range(16))


def test_so_many_rows_at_most() -> None:
    """Five steps of 100 rows have room, and six do not."""
    caches = Caches()
    assert all([caches.step(0, num_reqs=100) for _ in range(5)]) and caches.num_injections == 0
    assert caches.step(1, num_reqs=100)
    assert caches.written() == [0] * 100


def test_no_more_rows_than_are_injected_at_once() -> None:
    """vLLM compiles the injection for no more rows than a step has, here 6: room for three steps of two."""
    caches = Caches(max_rows=6)
    assert all([caches.step(position, num_reqs=2) for position in range(3)]) and caches.num_injections == 0
    assert caches.step(3, num_reqs=2)
    assert caches.written() == [0, 0, 1, 1, 2, 2]
    assert not caches.step(4, num_reqs=7)


def test_before_a_window_has_passed() -> None:
    """Of 4 slots: when position 3 runs, 0 is the last one it sees; before 4 runs, 0 may have become another's."""
    caches = Caches(smallest_window=4)
    assert all([caches.step(position, num_reqs=1) for position in range(3)])
    assert caches.written() == []
    assert caches.step(3, num_reqs=1)
    assert caches.written() == [0, 1, 2]


@pytest.mark.parametrize(
    ("num_reqs", "num_rows", "window"),
    [
        pytest.param(2, 5, None, id="a prompt"),
        pytest.param(129, 129, None, id="rows enough by themselves"),
        pytest.param(1, 1, 2, id="a window of two slots"),
    ],
)
def test_steps_that_are_not_kept(num_reqs: int, num_rows: int, window: int | None) -> None:
    caches = Caches(window)
    kept = caches.step(8, num_reqs=1)
    assert not caches.step(9, num_reqs, num_rows)
    caches.backlog.inject()
    assert caches.written() == ([8] if kept else [])


def test_before_slots_are_others() -> None:
    caches = Caches()
    caches.step(5, num_reqs=1)
    caches.backlog.before_step(loses_requests=False, has_rows=True)
    caches.backlog.before_step(loses_requests=False, has_rows=False)
    caches.backlog.before_step(loses_requests=True, has_rows=False)  # an engine asleep
    caches.backlog.before_step(loses_requests=False, has_rows=False)
    assert caches.written() == []
    caches.backlog.before_step(loses_requests=False, has_rows=True)
    assert caches.written() == [5]
    caches.step(6, num_reqs=1)
    caches.backlog.before_step(loses_requests=False, has_rows=True)
    assert caches.written() == [5]
    caches.backlog.before_step(loses_requests=True, has_rows=True)
    assert caches.written() == [5, 6]
