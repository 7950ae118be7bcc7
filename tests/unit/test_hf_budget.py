# SPDX-License-Identifier: Apache-2.0
"""tree_budget="auto": its arithmetic by hand, and the text that comes out."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch

from tests.helpers import drafter, target
from vllm_dflash.hf import SpecGenerateOutput
from vllm_dflash.hf.budget import BUDGETS, TRIALS, RoundCosts, expected_acceptance

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = torch.tensor([[5, 9, 2, 40, 7], [0, 0, 81, 3, 17]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def costs(milliseconds: dict[int, float]) -> RoundCosts:
    """After all trials: the first round of each, a slow one, does not count."""
    table = RoundCosts(list(milliseconds))
    for budget, ms in milliseconds.items():
        table.record(budget, 1.0)
        for _ in range(TRIALS - 1):
            table.record(budget, ms / 1000)
    return table


@pytest.mark.parametrize(
    ("milliseconds", "expected", "best"),
    [
        ({3: 10.0, 7: 10.0, 15: 10.0}, [1.0, 1.5, 1.8], 15),  # rows are free
        ({3: 10.0, 7: 20.0, 15: 40.0}, [1.0, 1.5, 1.8], 3),  # 200, 125, 70 tokens a second
        ({3: 10.0, 7: 12.0, 15: 16.0}, [1.0, 1.5, 1.8], 7),  # 200, 208, 175
        ({3: 10.0, 7: 12.0, 15: 16.0}, [0.1, 0.1, 0.1], 3),  # nothing to be had from more nodes
    ],
    ids=["free", "dear", "between", "hopeless"],
)
def test_most_tokens_a_second(milliseconds: dict[int, float], expected: list[float], best: int) -> None:
    assert costs(milliseconds).choose(expected, most=15) == best


def test_no_more_than_was_drafted() -> None:
    assert costs({3: 10.0, 7: 10.0, 15: 10.0}).choose([1.0, 1.5, 1.8], most=7) == 7


def test_every_budget_is_tried_first() -> None:
    table, seen = RoundCosts([3, 7]), []
    for _ in range(2 * TRIALS):
        seen.append(table.choose([0.0, 0.0], most=7))
        table.record(seen[-1], 0.01)
    assert sorted(seen) == [3] * TRIALS + [7] * TRIALS


def test_nodes_worth_drafting() -> None:
    table = costs({3: 10.0, 7: 12.0, 15: 16.0})
    assert [table.worth_drafting(last) for last in (None, 3, 7, 15)] == [15, 7, 15, 15]
    assert RoundCosts([3, 7]).worth_drafting(7) == 3, "trials come first"


def test_a_median_of_late_rounds() -> None:
    """One slow round changes nothing; a budget that has become slow is noticed."""
    table = costs({3: 10.0, 7: 12.0})
    table.record(7, 0.1)
    assert table.choose([1.0, 1.5], most=7) == 7
    for _ in range(9):
        table.record(7, 0.1)
    assert table.choose([1.0, 1.5], most=7) == 3


def test_expected_acceptance_by_hand() -> None:
    """Node probabilities 0.5, 0.3, 0.2 and 0.9, 0.8, 0.1; the third row has ended."""
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.8, 0.1], [1.0, 1.0, 1.0]])
    got = expected_acceptance(probs.log(), torch.tensor([True, True, False]), budgets=[1, 2, 3, 64])
    assert got.tolist() == pytest.approx([0.7, 1.25, 1.4, 1.4])


def test_nodes_that_are_none_expect_nothing() -> None:
    got = expected_acceptance(torch.tensor([[math.log(0.5), -math.inf]]), torch.tensor([True]), budgets=[1, 2])
    assert got.tolist() == pytest.approx([0.5, 0.5])


def test_the_text_is_the_targets() -> None:
    model, draft = target(), drafter(block_size=5)
    expected = model.generate(PROMPTS, attention_mask=MASK, do_sample=False, max_new_tokens=60, pad_token_id=0)
    output = draft.spec_generate(PROMPTS, model, 60, attention_mask=MASK, tree_budget="auto", return_stats=True)
    assert isinstance(output, SpecGenerateOutput)
    assert torch.equal(output.sequences, expected)
    assert len(output.budgets) == max(map(len, output.acceptance_lengths_by_row))
    assert {budget: output.budgets.count(budget) >= TRIALS for budget in BUDGETS} == dict.fromkeys(BUDGETS, True)
    assert output.budgets[:TRIALS] == [3] * TRIALS
    again = draft.spec_generate(PROMPTS, model, 20, attention_mask=MASK, tree_budget="auto", return_stats=True)
    assert isinstance(again, SpecGenerateOutput)
    assert again.budgets[:TRIALS] != [3] * TRIALS or len(set(again.budgets)) == 1, "tried once, known from then on"
