# SPDX-License-Identifier: Apache-2.0
"""Batches: padding, cutting, and features that are the outputs of the layers asked for."""

import torch
from tiny_training import counting_responses, tiny_target

from vllm_dflash.training.data import collate, target_features
from vllm_dflash.training.responses import Response


def test_collate_pads_and_cuts():
    batch = collate([Response([5, 6], [7], 0.0), Response([5], [6, 7, 8, 9, 10], 0.0)], padded_length=4)
    assert batch.token_ids.tolist() == [[5, 6, 7, 0], [5, 6, 7, 8]]
    assert batch.prompt_lengths.tolist() == [2, 1]
    assert batch.lengths.tolist() == [3, 4]


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
