# SPDX-License-Identifier: Apache-2.0
"""Reading one batch ahead: the right batches, before they are asked for, and errors where they are."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch

from vllm_dflash.training.batch_plan import BatchPlan
from vllm_dflash.training.read_ahead import ReadAhead

LENGTHS = [64, 72, 64, 100, 90, 64, 72]


class Disk:
    """Gives back what it is asked for, and remembers it."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []
        self.has_read = threading.Semaphore(0)
        self.breaks_at: int | None = None  # the call from 1 on

    def read(self, indices: Sequence[int], padded_length: int) -> torch.Tensor:
        self.asked.append(tuple(indices))
        self.has_read.release()
        if len(self.asked) == self.breaks_at:
            raise OSError("no such disk")
        return torch.tensor([*indices, padded_length])


def made(stride: int = 1) -> tuple[ReadAhead, Disk, BatchPlan]:
    disk, plan = Disk(), BatchPlan(LENGTHS, max_length=128, batch_tokens=150, seed=3)
    return ReadAhead(disk.read, plan, stride, torch.device("cpu")), disk, plan


@pytest.mark.parametrize("numbers", [range(12), range(1, 12, 2), [5, 6, 2, 3]], ids=["all", "of a rank", "resumed"])
def test_every_batch_is_the_planned_one(numbers: Sequence[int]) -> None:
    ahead, _, _ = made(stride=2 if numbers == range(1, 12, 2) else 1)
    expected = BatchPlan(LENGTHS, max_length=128, batch_tokens=150, seed=3)
    for number in numbers:
        planned = expected.batch(number)
        assert ahead.take(number).tolist() == [*planned.indices, planned.padded_length]


def test_the_next_one_is_read_before_it_is_asked_for() -> None:
    ahead, disk, plan = made(stride=3)
    ahead.take(0)
    for _ in range(2):
        assert disk.has_read.acquire(timeout=10)
    assert disk.asked == [plan.batch(0).indices, plan.batch(3).indices]
    ahead.take(3)
    assert disk.has_read.acquire(timeout=10)
    assert disk.asked[1:] == [plan.batch(3).indices, plan.batch(6).indices]


@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_reaches_the_one_who_asks_for_the_batch(broken: int) -> None:
    ahead, disk, _ = made()
    disk.breaks_at = 1 + broken
    for number in range(broken):
        ahead.take(number)
    with pytest.raises(OSError, match="no such disk"):
        ahead.take(broken)


@pytest.mark.parametrize(("device", "expected"), [("cuda", 5), ("cuda:3", 3)])
def test_the_thread_pins_for_its_own_device(device: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    disk, plan = Disk(), BatchPlan(LENGTHS, max_length=128, batch_tokens=150, seed=3)
    ReadAhead(disk.read, plan, 1, torch.device(device)).take(0)
    assert chosen == [expected]
