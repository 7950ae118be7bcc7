# SPDX-License-Identifier: Apache-2.0
"""Random blocks of a batch, drafted in one forward: what the drafter says, and what it was to say.

Letters: B sequences, S padded length, N blocks a sequence, K drafted tokens, H hidden size, V vocabulary, F tapped
layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vllm_dflash.training.anchors import block_labels, block_positions, block_token_ids, choose_anchors
from vllm_dflash.training.data import Batch
from vllm_dflash.training.flex_masks import attention_mask_for


@dataclass(frozen=True)
class BlockShape:
    """How many blocks there are, and of how many rows."""

    block_size: int
    mask_token_id: int
    most_anchors: int  # of a sequence
    tokens_per_anchor: int  # one block for so many padded tokens

    def choose_anchors(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Anchors of a batch [B, N], and which of them are valid [B, N]."""
        count = self.num_anchors(batch.token_ids.shape[1])
        return choose_anchors(batch.prompt_lengths, batch.lengths, count, generator)

    def num_anchors(self, padded_length: int) -> int:
        """Of each sequence of a batch."""
        return max(1, min(self.most_anchors, padded_length // self.tokens_per_anchor))


@dataclass(frozen=True)
class DraftedBlocks:
    """The drafter's hidden states, ready for the LM head, and the tokens of the text."""

    hidden: Tensor  # [B, N, K, H]
    labels: Tensor  # [B, N, K], IGNORED where there is nothing to predict
    anchors: Tensor  # [B, N]

    def chunks(self, rows: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Blocks of all sequences in pieces of about so many rows: which [of B*N], hidden [M, K, H], labels [M, K]."""
        hidden, labels = self.hidden.flatten(0, 1), self.labels.flatten(0, 1)
        size = max(1, rows // hidden.shape[1])
        for start in range(0, len(hidden), size):
            piece = slice(start, start + size)
            yield piece, hidden[piece], labels[piece]


def draft_blocks(
    draft: nn.Module,
    target: nn.Module,
    batch: Batch,
    features: Tensor,  # [B, S, F*H]
    anchors: Tensor,  # [B, N]
    valid: Tensor,  # bool [B, N]
    shape: BlockShape,
) -> DraftedBlocks:
    """Draft behind each anchor. The embedding is the target's, frozen (paper, section 3)."""
    padded = batch.token_ids.shape[1]
    block_ids = block_token_ids(batch.token_ids, anchors, shape.block_size, shape.mask_token_id)
    context_positions = torch.arange(padded, device=anchors.device).expand(len(anchors), -1)
    hidden = draft(
        position_ids=torch.cat((context_positions, block_positions(anchors, shape.block_size)), dim=1),
        noise_embedding=target.get_input_embeddings()(block_ids).float(),
        target_hidden=features,
        attention_mask=attention_mask_for(anchors.device, anchors, padded, shape.block_size),
    )  # [B, N*Q, H]
    drafted = hidden.unflatten(1, (-1, shape.block_size))[:, :, 1:]
    labels = block_labels(batch.token_ids, batch.lengths, anchors, valid, shape.block_size)
    return DraftedBlocks(drafted, labels, anchors)
