# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of steps on several GPUs, against sums worked out by hand."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

#: Two layers of 3 heads and 1 K/V head of 2, hidden 4: 2*4*6 + 2*4*2 + 3*4*5 = 124 values in a layer.
CONFIG = {
    "num_hidden_layers": 2, "hidden_size": 4, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 2,
    "intermediate_size": 5, "vocab_size": 10,
}  # fmt: skip


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return __import__("scaling.model", fromlist=["model"])


def test_a_shape_is_read_from_a_configuration(model: ModuleType) -> None:
    assert model.Shape.of(CONFIG) == model.Shape(2, 4, 124, 40, 4)


def test_experts_are_refused(model: ModuleType) -> None:
    with pytest.raises(ValueError, match="num_experts = 8"):
        model.Shape.of(CONFIG | {"num_experts": 8})


def test_reading_weights(model: ModuleType) -> None:
    """1 GB/s: 248 + 40 values of 2 bytes are 576 ns; a card that computes at once, and nothing else."""
    card = model.Card("slow", 1e-3, 1e9, 1e9, 0.0, 0.0, 0.0, 1e9, 0.0)
    shape = model.Shape.of(CONFIG)
    assert model.step_ms(card, shape, shape, 1, 0, 0) == pytest.approx(576e-6)
    assert model.step_ms(card, shape, shape, 1, 0, 0, ranks=2) == pytest.approx(288e-6)
    assert model.step_ms(card, shape, shape, 1, 0, 3) == pytest.approx(2 * 576e-6)


def test_computing(model: ModuleType) -> None:
    """1 GFLOP/s: 3 requests of 5 rows each, two operations a weight; the drafter's head has 4 rows of each."""
    card = model.Card("slow", 1e9, 1e9, 1e-3, 0.0, 0.0, 0.0, 1e9, 0.0)
    shape = model.Shape.of(CONFIG)
    verifying, drafting = 2 * 15 * 288, 2 * (15 * 248 + 12 * 40)
    assert model.step_ms(card, shape, shape, 3, 0, 4) == pytest.approx((verifying + drafting) * 1e-6)
    assert model.draft_ms(card, shape, 3, 0, 4, ranks=2) == pytest.approx(drafting / 2 * 1e-6)
    whole = 2 * (15 * 248 + 12 * 40 / 2)
    assert model.draft_ms(card, shape, 3, 0, 4, ranks=2, is_whole=True) == pytest.approx(whole * 1e-6)


def test_contexts_and_activations(model: ModuleType) -> None:
    """1 GB/s: 3 requests * 100 tokens * 2 layers * 4 values * 2 bytes; 3 rows * 2 layers * hidden 4 * 2 bytes * 10."""
    card = model.Card("slow", 1e9, 1e-3, 1e9, 0.0, 10.0, 0.0, 1e9, 0.0)
    shape = model.Shape.of(CONFIG)
    assert model.step_ms(card, shape, shape, 3, 100, 0) == pytest.approx((4800 + 480) * 1e-6)
    assert model.step_ms(card, shape, shape, 3, 100, 0, ranks=4) == pytest.approx((1200 + 480 * 5 / 8) * 1e-6)


def test_sums_of_ranks(model: ModuleType) -> None:
    """Four of 5 us, each of which moves 1.5 times 3 rows * hidden 4 * 2 bytes at 1 GB/s; 7 us a layer besides."""
    card = model.Card("slow", 1e9, 1e9, 1e9, 7.0, 0.0, 5.0, 1.0, 0.0)
    shape = model.Shape.of(CONFIG)
    assert model.step_ms(card, shape, shape, 3, 0, 0) == pytest.approx(14e-3, rel=1e-3)
    assert model.step_ms(card, shape, shape, 3, 0, 0, ranks=4) == pytest.approx(14e-3 + 20e-3 + 4 * 36e-6, rel=1e-3)


def test_no_step_is_shorter_than_the_hosts_work(model: ModuleType) -> None:
    card = model.Card("fast", 1e9, 1e9, 1e9, 0.0, 0.0, 0.0, 1e9, 3.5)
    shape = model.Shape.of(CONFIG)
    assert model.step_ms(card, shape, shape, 3, 0, 4) == 3.5


def test_acceptance(model: ModuleType) -> None:
    assert model.tokens_of_step(0.5, 3) == 1.875
    assert model.acceptance_rate(1.875, 3) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="acceptance length 5 of 3 draft tokens"):
        model.acceptance_rate(5, 3)
