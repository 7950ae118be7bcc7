# SPDX-License-Identifier: Apache-2.0
"""Batches: padding, cutting, and features that are the outputs of the layers asked for."""

import random

import pytest
import torch
from tiny_training import counting_responses, tiny_target

from vllm_dflash.training.data import batches, collate, target_features
from vllm_dflash.training.responses import Response


def test_collate_pads_and_cuts():
    batch = collate([Response([5, 6], [7], 0.0), Response([5], [6, 7, 8, 9, 10], 0.0)], padded_length=4)
    assert batch.token_ids.tolist() == [[5, 6, 7, 0], [5, 6, 7, 8]]
    assert batch.prompt_lengths.tolist() == [2, 1]
    assert batch.lengths.tolist() == [3, 4]


def test_a_pass_uses_every_response_once_in_its_bucket():
    short = [Response([i], [i, i, i], 0.0) for i in range(4, 10)]
    long = [Response([i], [i] * 9, 0.0) for i in range(10, 13)]
    stream = batches(short + long, buckets=(4, 10), batch_tokens=12, rng=random.Random(0))
    first_pass = [next(stream) for _ in range(5)]  # 6 short ones, three a batch, and 3 long ones, one a batch
    assert sorted(batch.token_ids[row, 0].item() for batch in first_pass for row in range(len(batch.lengths))) == list(
        range(4, 13)
    )
    assert {tuple(batch.token_ids.shape) for batch in first_pass} == {(3, 4), (1, 10)}


def test_last_batch_is_filled_up_so_that_shapes_stay():
    stream = batches([Response([i], [i, i, i], 0.0) for i in range(4, 9)], (4,), batch_tokens=12, rng=random.Random(0))
    first_pass = [next(stream), next(stream)]
    assert [tuple(batch.token_ids.shape) for batch in first_pass] == [(3, 4), (3, 4)]
    assert {token for batch in first_pass for token in batch.token_ids[:, 0].tolist()} == set(range(4, 9))


def test_responses_too_short_to_draft_are_refused():
    with pytest.raises(ValueError, match="none of 1 responses"):
        next(batches([Response([4, 5], [6], 0.0)], (16,), 64, random.Random(0)))


def test_features_are_layer_outputs_and_padding_does_not_matter():
    """Against Transformers' own hidden states: entry i + 1 is the output of layer i, all but the last, normed one."""
    target, batch = tiny_target(), collate(counting_responses(2), 40)
    features = target_features(target, batch.token_ids, [0, 2])
    with torch.no_grad():
        states = target(batch.token_ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(features, torch.cat((states[1], states[3]), dim=-1))
    longer = collate(counting_responses(2), 50)
    padded = target_features(target, longer.token_ids, [0, 2])[:, :40]
    torch.testing.assert_close(padded, features, rtol=1e-3, atol=1e-3)  # other shapes, other order of sums
