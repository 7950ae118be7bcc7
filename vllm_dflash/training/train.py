# SPDX-License-Identifier: Apache-2.0
"""Trains a drafter against a frozen target (paper, sections 4.2 and A.1)."""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen3Config

from vllm_dflash.hf import DFlashDraftModel
from vllm_dflash.training.blocks import BlockShape, draft_blocks
from vllm_dflash.training.checkpoint import drop_state, load_state, save_state
from vllm_dflash.training.data import Batch, batches, target_features
from vllm_dflash.training.loss import block_accuracy, block_loss
from vllm_dflash.training.masks import block_mask
from vllm_dflash.training.responses import Response
from vllm_dflash.training.schedule import cosine_with_warmup

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DrafterSettings:
    """Shape and schedule of the drafter's training. Block 16 and gamma 7 belong together (paper, section 4.2)."""

    num_layers: int = 3
    intermediate_size: int = 384
    target_layer_ids: tuple[int, ...] = (1, 3, 5, 6)
    block_size: int = 16
    gamma: float = 7.0
    steps: int = 2500
    batch_tokens: int = 4096  # padded target tokens a step
    tokens_per_anchor: int = 16  # one block for so many padded tokens of a sequence
    buckets: tuple[int, ...] = (256, 448, 704)
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup: float = 0.04  # share of the steps
    seed: int = 2
    compile: bool = True
    checkpoint_every: int = 250  # steps
    greedy_only: bool = False  # leave sampled responses out: acceptance at temperature 0 is about the target's argmax


def drafter_config(target: Qwen3Config, mask_token_id: int, settings: DrafterSettings) -> Qwen3Config:
    """A drafter as wide as its target, in the published layout."""
    return Qwen3Config(
        architectures=["DFlashDraftModel"],
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=target.num_attention_heads,
        num_key_value_heads=target.num_key_value_heads,
        head_dim=target.head_dim,
        max_position_embeddings=target.max_position_embeddings,
        rope_parameters=dict(target.rope_parameters),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=target.eos_token_id,
        dtype="bfloat16",
        block_size=settings.block_size,
        num_target_layers=target.num_hidden_layers,
        dflash_config={"mask_token_id": mask_token_id, "target_layer_ids": list(settings.target_layer_ids)},
    )


def draft_batch(
    draft: nn.Module,
    target: nn.Module,
    batch: Batch,
    settings: DrafterSettings,
    mask_token_id: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draft random blocks of a batch in one forward: (logits [B, N, K, V], labels [B, N, K])."""
    padded = batch.token_ids.shape[1]
    features = target_features(target, batch.token_ids, settings.target_layer_ids)  # [B, S, F*H]
    shape = BlockShape(settings.block_size, mask_token_id, padded, settings.tokens_per_anchor)
    with torch.autocast(batch.token_ids.device.type, dtype=torch.bfloat16):
        anchors, valid = shape.choose_anchors(batch, generator)
        blocks = draft_blocks(draft, target, batch, features, anchors, valid, shape, block_mask)
        return target.get_output_embeddings()(blocks.hidden), blocks.labels


def train_drafter(
    target: nn.Module,
    responses: Sequence[Response],
    config: Qwen3Config,
    settings: DrafterSettings,
    output: Path,
    initial: DFlashDraftModel | None = None,
) -> DFlashDraftModel:
    """Train and write the bf16 model to `output` in the published layout; goes on from a checkpoint there.

    Starts from the weights of `initial`, or from random ones.
    """
    torch.manual_seed(settings.seed)
    draft = DFlashDraftModel(config).float().train()
    if initial is not None:
        draft.load_state_dict(initial.state_dict())
    if settings.greedy_only:
        responses = [response for response in responses if response.temperature == 0.0]
    target = target.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        draft.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    done = load_state(output, draft, optimizer)
    forward = torch.compile(draft, dynamic=False) if settings.compile else draft
    stream = batches(responses, settings.buckets, settings.batch_tokens, random.Random(settings.seed))
    started = time.monotonic()
    for step, batch in enumerate(itertools.islice(stream, settings.steps), start=1):
        if step <= done:
            continue
        scale = cosine_with_warmup(step, settings.steps, settings.warmup)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * scale
        # Seeded by the step, so that a resumed training draws the anchors of an uninterrupted one.
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        logits, labels = draft_batch(forward, target, batch, settings, draft.mask_token_id, generator)
        loss = block_loss(logits, labels, settings.gamma)
        loss.backward()
        nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == settings.steps:
            run, seconds = block_accuracy(logits, labels).run, time.monotonic() - started
            logger.info(
                "drafter step %d/%d loss %.3f run %.2f, %.0f s", step, settings.steps, loss.item(), run, seconds
            )
        if step % settings.checkpoint_every == 0:
            save_state(output, step, draft, optimizer)
    saved = save_drafter(draft, output)
    drop_state(output)
    return saved


def save_drafter(draft: DFlashDraftModel, output: Path) -> DFlashDraftModel:
    """Write config.json and bf16 weights to `output`; returns the bf16 copy that was written."""
    copy = DFlashDraftModel(draft.config).to(torch.bfloat16).eval()
    copy.load_state_dict(draft.state_dict())
    copy.save_pretrained(output)
    return copy
