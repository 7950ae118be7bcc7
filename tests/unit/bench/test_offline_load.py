# SPDX-License-Identifier: Apache-2.0
"""What an engine's outputs and refusals become, with a stand-in for the engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.bench.test_templates import Refusing
from vllm_dflash.benchmark.job import LoadJob
from vllm_dflash.benchmark.offline_load import InFlight, Load
from vllm_dflash.benchmark.sets.conversations import Conversation

JOB = LoadJob("target", ())


def load(tokenizer: Any, *conversations: Conversation) -> Load:
    llm: Any = SimpleNamespace(llm_engine=None, get_tokenizer=lambda: tokenizer)
    return Load(llm, JOB, conversations, 1, "salt")


def test_what_the_template_refuses_stops_no_other() -> None:
    records = list(load(Refusing(), Conversation("a", ("x", "y")), Conversation("b", ("z",))).records())
    assert [(record.name, record.turn, record.error.kind if record.error else None) for record in records] == [
        ("a", 1, "refused"),
        ("b", 1, "refused"),
    ]


class Tokens:
    def apply_chat_template(self, messages: Any, **_: Any) -> list[int]:
        return [0] * len(messages)


@pytest.mark.parametrize("kind", ["VLLMValidationError", "VLLMUnprocessableEntityError"])
def test_what_the_engine_refuses_stops_no_other(kind: str) -> None:
    errors = pytest.importorskip("vllm.exceptions")

    def add_request(name: str, prompt: dict[str, Any], sampling: Any) -> None:
        raise getattr(errors, kind)("longer than the maximum model length")

    running = load(Tokens(), Conversation("a", ("x",)), Conversation("b", ("z",)))
    running.engine = SimpleNamespace(add_request=add_request)
    records = list(running.records())
    assert [(record.name, record.error and record.error.detail) for record in records] == [
        ("a", "longer than the maximum model length"),
        ("b", "longer than the maximum model length"),
    ]


def test_what_the_engine_gave_up_is_no_answer() -> None:
    one = load(None)
    one.in_flight["r"] = InFlight(Conversation("a", ("x", "y")), turn=1)
    completion = SimpleNamespace(token_ids=[7], text="t", finish_reason="abort", spec_decode_metrics=None)
    output = SimpleNamespace(request_id="r", outputs=[completion], finished=True)
    (record,) = one._read([output])
    assert record.error is not None and record.error.kind == "aborted"
    assert not one.in_flight
