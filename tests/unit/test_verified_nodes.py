# SPDX-License-Identifier: Apache-2.0
"""How many draft tokens were verified, on its way from the runner to vLLM's counters."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput

from vllm_dflash.compat import patching
from vllm_dflash.compat.verified_nodes import install_scheduler, not_verified, sample_tokens, update_from_output


@pytest.mark.parametrize(
    ("planned", "num_verified", "expected"),
    [
        ({"a": 4, "b": 2, "c": 2}, 4, {"a": 2, "b": 1, "c": 1}),
        ({"a": 3, "b": 3}, 6, {"a": 0, "b": 0}),
        ({"a": 3, "b": 3}, 0, {"a": 3, "b": 3}),
        ({}, 0, {}),
    ],
)
def test_by_hand(planned: dict[str, int], num_verified: int, expected: dict[str, int]) -> None:
    assert not_verified(planned, num_verified) == expected


@given(counts=st.lists(st.integers(1, 63), min_size=1, max_size=20), data=st.data())
def test_the_sum_is_right(counts: list[int], data: st.DataObject) -> None:
    planned = {str(index): count for index, count in enumerate(counts)}
    num_verified = data.draw(st.integers(0, sum(counts)))
    missing = not_verified(planned, num_verified)
    assert sum(counts) - sum(missing.values()) == num_verified
    assert all(0 <= missing[name] <= count for name, count in planned.items())


def ran(monkeypatch: pytest.MonkeyPatch, adaptive_verification: Any) -> ModelRunnerOutput:
    """A step's output as the scheduler's process gets it."""
    output = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    waiting = SimpleNamespace(model_runner_output=output)
    monkeypatch.setattr(patching, "original", lambda owner, name: lambda self, grammar_output: waiting)
    runner = SimpleNamespace(adaptive_verification=adaptive_verification)
    assert sample_tokens(runner, None) is waiting
    return pickle.loads(pickle.dumps(waiting.model_runner_output))


def counted(monkeypatch: pytest.MonkeyPatch, output: ModelRunnerOutput) -> Any:
    """What vLLM's scheduler is told of tokens that are none."""
    seen: list[Any] = []
    monkeypatch.setattr(patching, "original", lambda owner, name: lambda self, *given: seen.append(given))
    step = SimpleNamespace(scheduled_spec_decode_tokens={"a": [-1] * 5, "b": [-1] * 5}, num_invalid_spec_tokens=None)
    update_from_output(None, step, output)
    assert seen == [(step, output)]
    return step.num_invalid_spec_tokens


def test_from_the_runner_to_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("vllm.v1.worker.gpu.model_runner")
    assert hasattr(module.GPUModelRunner, "sample_tokens")
    assert counted(monkeypatch, ran(monkeypatch, SimpleNamespace(num_verified=4))) == {"a": 3, "b": 3}


@pytest.mark.parametrize("adaptive_verification", [None, SimpleNamespace()], ids=["none", "vLLM's own"])
def test_other_engines_are_counted_as_ever(monkeypatch: pytest.MonkeyPatch, adaptive_verification: Any) -> None:
    assert counted(monkeypatch, ran(monkeypatch, adaptive_verification)) is None


def test_the_scheduler_is_patched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "_originals", {})
    host = SimpleNamespace(Scheduler=SimpleNamespace(update_from_output="vLLM's"))
    install_scheduler(host)  # type: ignore[arg-type]
    assert host.Scheduler.update_from_output is update_from_output
    assert hasattr(Scheduler, "update_from_output"), "vLLM's name is another by now"
