# SPDX-License-Identifier: Apache-2.0
"""What vLLM's scheduler sets aside for drafting, on vLLM's own property."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm.config import SpeculativeConfig

from vllm_dflash.compat import drafting_slots, ownership, patching


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's property for so many draft tokens of dflash, patched by the plugin if another test loaded it, or here."""
    before = SpeculativeConfig.max_num_new_slots_for_drafting
    if before.fget is not drafting_slots.max_num_new_slots_for_drafting:
        monkeypatch.setattr(patching, "_originals", {})
        monkeypatch.setattr(SpeculativeConfig, "max_num_new_slots_for_drafting", before)
        drafting_slots.install(SimpleNamespace(SpeculativeConfig=SpeculativeConfig))  # type: ignore[arg-type]

    def ask(num_speculative_tokens: int, slots: int | None) -> int:
        hf_config = SimpleNamespace()
        speculative = SpeculativeConfig.__new__(SpeculativeConfig)
        vars(speculative).update(
            method="dflash",
            num_speculative_tokens=num_speculative_tokens,
            draft_model_config=SimpleNamespace(hf_config=hf_config),
        )
        if slots is not None:
            ownership.plan_drafting_slots(SimpleNamespace(speculative_config=speculative), slots)  # type: ignore[arg-type]
        return speculative.max_num_new_slots_for_drafting

    return ask


def test_chains_take_what_vllm_says(asked: Any) -> None:
    assert asked(15, slots=None) == 15


@pytest.mark.parametrize("slots", [0, 15])
def test_trees_take_what_was_planned(asked: Any, slots: int) -> None:
    assert asked(63, slots) == slots
