# SPDX-License-Identifier: Apache-2.0
"""What a run reads and keeps before it trains: mask token, held-out prompts, responses, batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dflash.training.batch_plan import BatchPlan, padded
from vllm_dflash.training.held_out import split
from vllm_dflash.training.mask_token import find_mask_token
from vllm_dflash.training.recipe import DataRecipe
from vllm_dflash.training.responding import ask
from vllm_dflash.training.response_store import RESPONSES_FILE, ResponseStore
from vllm_dflash.training.responses import Response


class Tokenizer:
    """A vocabulary, and perhaps a mask token."""

    def __init__(self, *tokens: str, mask_token: str | None = None) -> None:
        self.tokens, self.mask_token = tokens, mask_token

    def get_vocab(self) -> dict[str, int]:
        return {token: row for row, token in enumerate(self.tokens)}


# The mask token.


@pytest.mark.parametrize(
    ("tokenizer", "rows", "wanted", "expected"),
    [
        pytest.param(Tokenizer("a", "<M>", "b", mask_token="<M>"), 8, None, 1, id="the tokenizer's own"),
        pytest.param(Tokenizer("a", "<|MASK|>"), 8, None, 1, id="a usual name"),
        pytest.param(Tokenizer("a", "b"), 8, None, 2, id="the first free row"),
        pytest.param(Tokenizer("a", "b", "<mask>"), 2, "b", 1, id="a mask token behind the embedding"),
        pytest.param(Tokenizer("a", "b"), 2, "b", 1, id="a named token"),
        pytest.param(Tokenizer("a", "b", mask_token="a"), 8, 7, 7, id="a named row"),
    ],
)
def test_the_mask_token(tokenizer: Tokenizer, rows: int, wanted: str | int | None, expected: int) -> None:
    assert find_mask_token(tokenizer, rows, wanted) == expected


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (None, r"2 tokens leave none of the embedding's 2 rows free.*model.mask_token"),
        ("c", r"model.mask_token: 'c' is not one token"),
        (2, r"model.mask_token: 2 is not a row .* has 2"),
    ],
)
def test_no_mask_token(wanted: str | int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_mask_token(Tokenizer("a", "b"), 2, wanted)


# Held-out prompts.

PROMPTS = {f"p{number}": [number, number + 1] for number in range(10)}


def test_held_out_prompts_do_not_depend_on_the_order() -> None:
    training, held_out = split(PROMPTS, 3, None)
    assert len(held_out) == 3 and dict(training) | dict(held_out) == PROMPTS
    _, again = split(dict(reversed(PROMPTS.items())), 3, None)
    assert set(again) == set(held_out)


def test_equal_prompts_are_on_one_side() -> None:
    twice = PROMPTS | {f"again {key}": ids for key, ids in PROMPTS.items()}
    training, held_out = split(twice, 3, None)
    assert not {tuple(ids) for ids in training.values()} & {tuple(ids) for ids in held_out.values()}
    assert len(training) == 7


def test_few_enough_to_train_on_are_taken() -> None:
    assert list(split(PROMPTS, 3, 2)[0]) == list(split(PROMPTS, 3, None)[0])[:2]
    with pytest.raises(ValueError, match=r"10 different prompts.*data.held_out = 10 .*none to train on"):
        split(PROMPTS, 10, None)


# What is asked.


def test_the_mix_of_responses_follows_from_the_prompts() -> None:
    data = DataRecipe(sampled_share=0.5, temperatures=(0.6, 0.9), max_new_tokens=10, max_length=20)
    prompts = {f"p{number}": [1] * 5 for number in range(400)}
    asked = ask(prompts, data)
    assert ask(dict(reversed(prompts.items())), data) == asked[::-1]
    sampled = [each.temperature for each in asked if each.temperature > 0]
    assert 150 < len(sampled) < 250 and set(sampled) == {0.6, 0.7, 0.8, 0.9}
    assert len({each.seed for each in asked}) == 400


def test_a_response_has_the_room_that_its_prompt_leaves(caplog: pytest.LogCaptureFixture) -> None:
    data = DataRecipe(max_new_tokens=10, max_length=20)
    with caplog.at_level("WARNING"):
        asked = ask({"short": [1] * 4, "long": [1] * 15, "full": [1] * 19, "none": []}, data)
    assert [(each.id, each.max_tokens) for each in asked] == [("short", 10), ("long", 5)]
    assert "2 prompts leave no room for a response within data.max_length = 20" in caplog.text
    with pytest.raises(ValueError, match="none of 1 prompts leaves room .* raise data.max_length"):
        ask({"full": [1] * 19}, data)


# The store.


def response(*ids: int) -> Response:
    return Response([1, 2], list(ids), 0.0)


def test_responses_are_there_again(tmp_path: Path) -> None:
    store = ResponseStore(tmp_path, {"target": "t"})
    store.add({"a": response(3), "b": response(4, 5)})
    again = ResponseStore(tmp_path, {"target": "t"})
    assert again.responses == {"a": response(3), "b": response(4, 5)}
    assert again.missing(["c", "b", "d"]) == ["c", "d"]


def test_a_line_cut_by_a_kill_is_written_again(tmp_path: Path) -> None:
    store = ResponseStore(tmp_path, {})
    store.add({"a": response(3)})
    with (tmp_path / RESPONSES_FILE).open("a") as file:
        file.write('{"id":"b","prompt_to')
    again = ResponseStore(tmp_path, {})
    assert again.missing(["a", "b"]) == ["b"]
    again.add({"b": response(4)})
    lines = (tmp_path / RESPONSES_FILE).read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["a", "b"]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    ResponseStore(tmp_path, {}).add({"a": response(3)})
    with (tmp_path / RESPONSES_FILE).open("a") as file:
        file.write('{"id": "b"}\n')
    with pytest.raises(ValueError, match=r"responses.jsonl:2: not a response record"):
        ResponseStore(tmp_path, {})


def test_responses_of_another_run_are_refused(tmp_path: Path) -> None:
    origin: dict[str, Any] = {"target": "t", "temperatures": (0.7, 1.0)}
    ResponseStore(tmp_path, origin)
    ResponseStore(tmp_path, origin)  # a tuple is a list in JSON
    with pytest.raises(ValueError, match=r"target was 't' there and is 'u' now"):
        ResponseStore(tmp_path, origin | {"target": "u"})


# Batches.


@given(st.integers(1, 100_000))
def test_padding_is_a_ninth_at_most(length: int) -> None:
    assert length <= padded(length) <= max(64, 9 / 8 * length)


def test_padded_lengths_are_few() -> None:
    assert [padded(length) for length in (1, 64, 65, 72, 127, 129, 250, 257)] == [64, 64, 72, 72, 128, 144, 256, 288]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(64, 1000), st.integers(0, 5))
def test_every_epoch_has_every_sequence_once(lengths: list[int], batch_tokens: int, epoch: int) -> None:
    plan = BatchPlan(lengths, 200, batch_tokens, seed=0)
    batches = [plan.batch(epoch * plan.epoch_size + place) for place in range(plan.epoch_size)]
    assert sorted(index for batch in batches for index in batch.indices) == list(range(len(lengths)))
    for batch in batches:
        assert all(min(lengths[index], 200) <= batch.padded_length <= 200 for index in batch.indices)
        assert len(batch.indices) == 1 or len(batch.indices) * batch.padded_length <= batch_tokens


def test_batches_are_filled_up_to_the_limit() -> None:
    """Padded to 64, 64, 64, 104, 128 and 256, at most 256 tokens a batch: by hand."""
    plan = BatchPlan([128, 10, 250, 64, 100, 64], 256, 256, seed=0)
    batches = sorted((sorted(batch.indices), batch.padded_length) for batch in map(plan.batch, range(3)))
    # Three of 64 leave no room for one of 104, since all four would be as long; 104 and 128 are padded to 128.
    assert plan.epoch_size == 3
    assert batches == [([0, 4], 128), ([1, 3, 5], 64), ([2], 256)]


def test_an_epoch_mixes_sequences_of_one_length_and_its_batches() -> None:
    plan = BatchPlan([10] * 8 + [100] * 8, 128, 208, seed=0)
    epochs = [[plan.batch(epoch * plan.epoch_size + n) for n in range(plan.epoch_size)] for epoch in range(4)]
    assert len({tuple(batch.padded_length for batch in epoch) for epoch in epochs}) > 1, "in another order"
    of_ten = [sorted(batch.indices for batch in epoch if batch.padded_length == 64) for epoch in epochs]
    assert any(first != other for first in of_ten for other in of_ten), "other sequences together"


def test_epochs_differ_and_seeds_do() -> None:
    plans = [BatchPlan([10] * 50, 64, 640, seed) for seed in (0, 0, 1)]
    first = [[plan.batch(number) for number in range(5)] for plan in plans]
    assert first[0] == first[1] != first[2]
    assert [plans[0].batch(number) for number in range(5, 10)] != first[0]
    with pytest.raises(ValueError, match="no sequences"):
        BatchPlan([], 64, 640, 0)
