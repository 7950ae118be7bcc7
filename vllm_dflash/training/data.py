# SPDX-License-Identifier: Apache-2.0
"""Batches for the drafter: padded responses and the target's hidden states over them.

Features are computed as they are needed: at these sizes the target's forward costs less than reading them from a disk.

Letters: B sequences, S padded length, F tapped layers, H hidden size.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vllm_dflash.hf import TargetFeatures
from vllm_dflash.training.responses import Response

MIN_RESPONSE_TOKENS = 2  # an anchor and one token to predict


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences. The target is causal, so padding behind a sequence does not change its features."""

    token_ids: Tensor  # [B, S]
    prompt_lengths: Tensor  # [B]
    lengths: Tensor  # [B]: prompt and response

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(self.token_ids.to(device), self.prompt_lengths.to(device), self.lengths.to(device))


def batches(
    responses: Sequence[Response], buckets: Sequence[int], batch_tokens: int, rng: random.Random
) -> Iterator[Batch]:
    """Endless passes over the responses in new random batches of at most `batch_tokens` padded tokens.

    Sequences are padded to the shortest of `buckets` that holds them and cut at the longest.
    Raises ValueError when no response is long enough to train on.
    """
    usable = [response for response in responses if len(response.token_ids) >= MIN_RESPONSE_TOKENS]
    usable = [r for r in usable if len(r.prompt_token_ids) + MIN_RESPONSE_TOKENS <= buckets[-1]]
    if not usable:
        raise ValueError(f"none of {len(responses)} responses has {MIN_RESPONSE_TOKENS} tokens within {buckets[-1]}")
    while True:
        yield from _one_pass(usable, buckets, batch_tokens, rng)


def _one_pass(
    responses: list[Response], buckets: Sequence[int], batch_tokens: int, rng: random.Random
) -> Iterator[Batch]:
    by_bucket: dict[int, list[Response]] = {bucket: [] for bucket in buckets}
    for response in responses:
        length = min(len(response.prompt_token_ids) + len(response.token_ids), buckets[-1])
        by_bucket[min(bucket for bucket in buckets if bucket >= length)].append(response)
    plan: list[tuple[int, list[Response]]] = []
    for bucket, members in by_bucket.items():
        rng.shuffle(members)
        size = max(1, batch_tokens // bucket)
        # Compiled code wants one shape a bucket: the last batch is filled up with sequences of earlier ones.
        members += rng.choices(members, k=-len(members) % size) if members else []
        plan += [(bucket, members[i : i + size]) for i in range(0, len(members), size)]
    rng.shuffle(plan)
    for bucket, members in plan:
        yield collate(members, bucket)


def collate(responses: Sequence[Response], padded_length: int) -> Batch:
    """Pad (with id 0) or cut every sequence to `padded_length`."""
    token_ids = torch.zeros(len(responses), padded_length, dtype=torch.long)
    lengths = []
    for row, response in enumerate(responses):
        ids = (response.prompt_token_ids + response.token_ids)[:padded_length]
        token_ids[row, : len(ids)] = torch.tensor(ids)
        lengths.append(len(ids))
    prompt_lengths = [len(response.prompt_token_ids) for response in responses]
    return Batch(token_ids, torch.tensor(prompt_lengths), torch.tensor(lengths))


@torch.no_grad()
def target_states(
    target: nn.Module,
    token_ids: Tensor,  # [B, S]
    layer_ids: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Outputs of the tapped layers side by side [B, S, F*H], and the last hidden states [B, S, H], without logits."""
    with TargetFeatures(target, layer_ids) as features:
        last = target.get_decoder()(token_ids, use_cache=False).last_hidden_state
        return features.take(), last


def target_features(
    target: nn.Module,
    token_ids: Tensor,  # [B, S]
    layer_ids: Sequence[int],
) -> Tensor:
    """Outputs of the target's decoder layers `layer_ids`, concatenated: [B, S, F*H]."""
    return target_states(target, token_ids, layer_ids)[0]
