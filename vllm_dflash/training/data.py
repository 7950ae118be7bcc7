# SPDX-License-Identifier: Apache-2.0
"""Batches for the drafter: padded responses and the target's hidden states over them.

Letters: B sequences, S padded length, F tapped layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vllm_dflash.hf import TargetFeatures
from vllm_dflash.training.responses import Response


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences. The target is causal, so padding behind a sequence does not change its features."""

    token_ids: Tensor  # [B, S]
    prompt_lengths: Tensor  # [B]
    lengths: Tensor  # [B]: prompt and response

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(*(sent(part, device) for part in (self.token_ids, self.prompt_lengths, self.lengths)))


def sent(
    part: Tensor,  # any shape, on the host
    device: torch.device,
) -> Tensor:
    """On the device, without waiting for what it does at present: from pageable memory a copy would."""
    return part.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part.to(device)


def collate(responses: Sequence[Response], padded_length: int) -> Batch:
    """Pad (with id 0) or cut every sequence to `padded_length`."""
    token_ids = torch.zeros(len(responses), padded_length, dtype=torch.long)
    lengths = []
    for row, response in enumerate(responses):
        ids = response.sequence[:padded_length]
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
