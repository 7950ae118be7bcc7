# SPDX-License-Identifier: Apache-2.0
"""Counts and times of runs on Transformers, by hand; the runs themselves are tested beside vLLM's in tests/e2e."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_dflash.benchmark import transformers_runs
from vllm_dflash.benchmark.sets.conversations import Conversation, PromptSet
from vllm_dflash.benchmark.transformers_runs import Clock, Pair, TransformersJob, run_transformers

JOB = TransformersJob("target", "drafter", "auto", 8, 0.0, 0.9, 0, True, None, 1)


class StandIn:
    """Answers every prompt with the token 5, and keeps what it was asked."""

    def __init__(self, job: TransformersJob) -> None:
        self.asked: list[list[dict[str, str]]] = []
        self.drafter = SimpleNamespace(block_size=4)
        self.tokenizer = SimpleNamespace(decode=lambda ids, **options: "five")

    def token_ids(self, messages: list[dict[str, str]]) -> torch.Tensor:
        if messages[-1]["content"] == "refuse":
            raise ValueError("the chat template refuses these messages")
        if messages[-1]["content"] == "too much":
            raise RuntimeError("out of memory")
        self.asked.append(list(messages))
        return torch.tensor([[1, 2]])

    def generate(self, ids: torch.Tensor, clock: Clock) -> tuple[torch.Tensor, list[int]]:
        return torch.tensor([[1, 2, 5]]), []

    spec_generate = generate


def run(monkeypatch: pytest.MonkeyPatch, *conversations: Conversation) -> tuple[StandIn, list[Any]]:
    pair = StandIn(JOB)
    monkeypatch.setattr(transformers_runs, "Pair", lambda job: pair)
    sets = [PromptSet("own", conversations, "own.jsonl")]
    return pair, list(run_transformers(JOB, sets, lambda *what: None, lambda record: None))


def test_a_warm_up_says_what_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    history = ({"role": "system", "content": "be brief"},)
    pair, _ = run(monkeypatch, Conversation("a", ("one", "two"), history))
    warm_up = [*history, {"role": "user", "content": "one"}]
    assert pair.asked[:2] == [warm_up, warm_up]
    assert len(pair.asked) == 2 + 4


def test_what_the_template_refuses_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    _, runs = run(monkeypatch, Conversation("a", ("refuse",)), Conversation("b", ("one",)))
    for one in runs:
        assert [record.error.kind if record.error else None for record in one.requests] == ["refused", None]


def test_an_error_comes_behind_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_runs, "Pair", StandIn)
    prompts = (Conversation("a", ("one",)), Conversation("b", ("too much",)))
    runs = run_transformers(JOB, [PromptSet("own", prompts, "own.jsonl")], lambda *what: None, lambda record: None)
    for one in (next(runs), next(runs)):
        assert [record.name for record in one.requests] == ["a"] and one.interrupted
    with pytest.raises(RuntimeError, match="out of memory"):
        next(runs)


@pytest.mark.parametrize(
    ("temperature", "sampling"),
    [
        (0.0, {"do_sample": False}),
        (0.7, {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "min_p": 0.0}),
    ],
)
def test_nothing_is_left_to_the_models_generation_config(temperature: float, sampling: dict[str, Any]) -> None:
    said: dict[str, Any] = {}
    pair: Any = Pair.__new__(Pair)
    pair.job, pair.stop_token_ids = replace(JOB, temperature=temperature), []
    pair.target = SimpleNamespace(generate=lambda ids, **options: said.update(options))
    pair.generate(torch.tensor([[1]]), Clock())
    others = ("attention_mask", "max_new_tokens", "streamer", "eos_token_id", "pad_token_id")
    assert {key: said[key] for key in said if key not in others} == {"repetition_penalty": 1.0} | sampling


def test_the_prompt_is_no_token() -> None:
    clock = Clock()
    clock.put("prompt")
    assert clock.first_token is None
    clock.put("first")
    first = clock.first_token
    assert first is not None and clock.last_token == first
    clock.put("second")
    assert clock.first_token == first
    assert clock.last_token is not None and clock.last_token >= first
