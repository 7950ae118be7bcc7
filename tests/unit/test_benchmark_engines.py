# SPDX-License-Identifier: Apache-2.0
"""Engines of the GPU benchmarks: what each is started with by its name, and in which order they take turns."""

from __future__ import annotations

import argparse
import itertools
import os
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu.decode.job

    return gpu.decode.job


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ours:7", {"draft_weights": "fp8"}),
        ("tree:31", {"draft_weights": "fp8", "tree": 31}),
        ("tree:auto", {"draft_weights": "fp8", "tree": "auto"}),
        ("paced", {"draft_weights": "fp8", "prefill_schedule_interval": "auto"}),
    ],
)
def test_options_by_name(job: ModuleType, name: str, expected: dict[str, Any]) -> None:
    given = {"dflash": {"draft_weights": "fp8"}, "other": 1}
    assert job.options(name, given) == {"dflash": expected, "other": 1}
    assert job.is_ours(name)


def test_names_that_say_something(job: ModuleType) -> None:
    from gpu.names import parse_engines

    names = ("none", "own:7", "adaptive", "ours", "paced", "paced:7", "tree:31", "tree:auto")
    assert parse_engines(",".join(names)) == names
    assert [name for name in names if job.is_ours(name)] == ["ours", "paced", "paced:7", "tree:31", "tree:auto"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("own:7", {"num_speculative_tokens": 7}),
        ("paced:7", {"num_speculative_tokens": 7}),
        ("paced", {"num_speculative_tokens": 15}),
        ("tree:31", {}),
        ("adaptive", {"num_speculative_tokens": 15, "enable_adaptive_verification": True}),
    ],
)
def test_speculation_by_name(job: ModuleType, name: str, expected: dict[str, Any]) -> None:
    workload = SimpleNamespace(args=SimpleNamespace(real=True), k=15, drafter={"path": "drafter"})
    assert job.speculation(name, workload) == {"method": "dflash", "model": "drafter"} | expected


def test_who_measures_itself_starts_alone(job: ModuleType) -> None:
    from gpu.engine_process import start_groups

    names = {"none": 0, "adaptive": 0, "tree:63": 0, "tree:auto": 0, "paced": 0}
    assert start_groups(names) == [["none", "tree:63", "paced"], ["adaptive"], ["tree:auto"]]
    assert start_groups(["tree:auto"]) == [["tree:auto"]]


def test_engines_are_given_back_as_asked_for(job: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that measures itself is started when the others have said that they are there."""
    from gpu import engine_process

    events: list[str] = []

    class FakeEngine:
        def __init__(self, name: str, *others: object) -> None:
            self.name = name
            events.append(f"{name} starts")

        def receive(self, timeout: float) -> dict[str, str]:
            events.append(f"{self.name} is there")
            return {"name": self.name}

        def stop(self) -> None:
            events.append(f"{self.name} ends")

    monkeypatch.setattr(engine_process, "Engine", FakeEngine)
    names = ("tree:auto", "none", "ours")
    jobs: dict[str, Any] = {name: {} for name in names}
    with engine_process.started_engines(jobs, "script", {name: {} for name in names}, tmp_path, 9.0) as (found, facts):
        assert list(found) == list(names)
        assert facts == {name: {"name": name} for name in names}
    started = ["none starts", "ours starts", "none is there", "ours is there", "tree:auto starts", "tree:auto is there"]
    assert events[:6] == started
    assert sorted(events[6:]) == ["none ends", "ours ends", "tree:auto ends"]


def test_few_engines_take_turns_in_every_order(job: ModuleType) -> None:
    from gpu.decode.turns import orders

    first = list(itertools.islice(orders(["none", "own", "ours"], seed=1), 12))
    assert set(first[:6]) == set(itertools.permutations(["none", "own", "ours"]))
    assert first[6:] == first[:6]


def test_many_engines_follow_different_ones(job: ModuleType) -> None:
    """Of ten, one seldom follows the same other one: by chance once in ten rounds."""
    from gpu.decode.turns import orders

    names = [str(number) for number in range(10)]
    drawn = list(itertools.islice(orders(names, seed=1), 200))
    assert all(sorted(order) == names for order in drawn)
    for place in (0, 9):
        assert {order[place] for order in drawn} == set(names)
    behind = sum(order.index("1") == order.index("0") + 1 for order in drawn)
    assert 8 <= behind <= 35  # 20 expected, 4.2 of them standard deviation
    assert drawn == list(itertools.islice(orders(names, seed=1), 200)) != list(itertools.islice(orders(names, 2), 200))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("pace", "unknown 'pace'"), ("tree", "tree:31"), ("paced:auto", "own:7"), ("none:3", "own:7")],
)
def test_names_that_say_nothing(job: ModuleType, name: str, complaint: str) -> None:
    from gpu.names import parse_engines

    with pytest.raises(argparse.ArgumentTypeError, match=complaint):
        parse_engines(f"none,{name}")


def test_all_threads_compute_on_the_cores_of_a_round(job: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu.cores import core_groups, keep_to

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {9, 3, 4, 7, 8})
    assert core_groups(2) == [[3, 4], [7, 8]]
    with pytest.raises(ValueError, match="6 cores of 5"):
        core_groups(6)
    monkeypatch.undo()
    before = os.sched_getaffinity(0)
    chosen, ended = {min(before)}, threading.Event()
    other = threading.Thread(target=ended.wait)
    other.start()
    try:
        keep_to(chosen)
        assert other.native_id is not None
        assert os.sched_getaffinity(0) == os.sched_getaffinity(other.native_id) == chosen
    finally:
        keep_to(before)
        ended.set()
        other.join()
