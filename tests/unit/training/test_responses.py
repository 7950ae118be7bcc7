# SPDX-License-Identifier: Apache-2.0
"""Regenerated responses: batched decoding with a cache against one forward over the whole text per token."""

import random

import pytest
import torch
from tiny_training import tiny_target

from vllm_dflash.training.kv_cache import RoomyLayer
from vllm_dflash.training.prompts import Prompt
from vllm_dflash.training.responses import (
    Response,
    ResponseSettings,
    equal_length_batches,
    generate,
    read_responses,
    regenerate,
    write_responses,
)


def plain_greedy(target, prompt: list[int], limit: int, ends: list[int]) -> list[int]:
    ids = list(prompt)
    while len(ids) - len(prompt) < limit and not (len(ids) > len(prompt) and ids[-1] in ends):
        with torch.no_grad():
            ids.append(target(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


def test_cached_batch_equals_plain_greedy_and_rows_end_on_their_own():
    target = tiny_target()
    prompts = [[4 + (7 * row + i * i) % 28 for i in range(5)] for row in range(12)]
    free = [plain_greedy(target, prompt, 40, []) for prompt in prompts]
    ends = [free[0][3], free[1][20]]  # tokens that do come up, so that rows really end at different steps
    expected = [plain_greedy(target, prompt, 40, ends) for prompt in prompts]
    assert len({len(ids) for ids in expected}) > 2
    assert generate(target, torch.tensor(prompts), 40, 0.0, ends, torch.Generator()) == expected


def test_sampling_follows_seed_and_temperature():
    target, prompts = tiny_target(), torch.tensor([[5, 6, 7]] * 4)

    def sample(seed):
        return generate(target, prompts, 12, 1.0, [2], torch.Generator().manual_seed(seed))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_batches_have_one_length_and_leftovers_come_last():
    prompts = [Prompt(str(i), "raw", "", [4] * length, "a.py") for i, length in enumerate([3] * 5 + [4] * 4)]
    sizes = [
        (len(rows), {len(p.prompt_token_ids) for p in rows})
        for rows in equal_length_batches(prompts, 4, random.Random(0))
    ]
    assert sorted(sizes[:2], key=str) == [(4, {3}), (4, {4})]
    assert sizes[2:] == [(1, {3})]


def test_regeneration_stops_at_the_token_budget():
    prompts = [Prompt(str(i), "raw", "", [5, 6, 4 + i], "a.py") for i in range(20)]
    settings = ResponseSettings(tokens=50, batch=4, max_new_tokens=10, sampled_share=0.5)
    responses = list(regenerate(tiny_target(), prompts, [2], settings))
    assert sum(len(response.token_ids) for response in responses) >= 50
    assert len(responses) < 20
    assert all(t == 0.0 or 0.7 <= t <= 1.0 for t in (response.temperature for response in responses))


def test_file_round_trip_and_bad_line(tmp_path):
    file, responses = tmp_path / "r.jsonl", [Response([1, 2], [3], 0.0), Response([4], [5, 6], 0.75)]
    write_responses(responses, file)
    assert read_responses(file) == responses
    assert not (tmp_path / "r.jsonl.partial").exists()
    with file.open("a") as out:
        out.write('{"token_ids": [1]}\n')
    with pytest.raises(ValueError, match="r.jsonl:3"):
        read_responses(file)


def test_full_cache_is_refused():
    layer = RoomyLayer(capacity=3)
    layer.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
    with pytest.raises(ValueError, match="3 positions asked to hold 4"):
        layer.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
