# SPDX-License-Identifier: Apache-2.0
"""Engines of the GPU benchmarks by name: what each is started with."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType
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


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("pace", "unknown 'pace'"), ("tree", "tree:31"), ("paced:auto", "own:7"), ("none:3", "own:7")],
)
def test_names_that_say_nothing(job: ModuleType, name: str, complaint: str) -> None:
    from gpu.names import parse_engines

    with pytest.raises(argparse.ArgumentTypeError, match=complaint):
        parse_engines(f"none,{name}")
