# SPDX-License-Identifier: Apache-2.0
"""Trains the small target: a `Qwen3ForCausalLM` on packed documents and on ChatML conversations cut from them.

Letters: B windows a batch, W window length in tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from vllm_dflash.training.checkpoint import drop_state, load_state, save_state
from vllm_dflash.training.schedule import cosine_with_warmup
from vllm_dflash.training.text_stream import windows
from vllm_dflash.training.tokenizer import MAX_LENGTH

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TargetSettings:
    """Size and schedule of the target's training."""

    tokens: int = 18_000_000  # in all phases together
    batch_tokens: int = 4096  # B * W
    # (window length, share of the tokens): short windows are cheaper; the last phase teaches the long positions.
    phases: tuple[tuple[int, float], ...] = ((512, 0.85), (MAX_LENGTH, 0.15))
    chat_share: float = 0.5  # of the training characters, in conversations
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup: float = 0.02  # share of all steps
    seed: int = 0
    compile: bool = True
    checkpoint_every: int = 250  # steps

    @property
    def phase_steps(self) -> list[int]:
        return [int(self.tokens * share / self.batch_tokens) for _, share in self.phases]

    @property
    def steps(self) -> int:
        return sum(self.phase_steps)


def target_config(vocab_size: int, eos_token_id: int) -> Qwen3Config:
    """The shipped target's shape: about 3.6M parameters, tied embeddings."""
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        dtype="bfloat16",
    )


def next_token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats. batch: [B, W + 1]."""
    with torch.autocast(batch.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits  # [B, W, V]
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def train_target(
    stream: np.ndarray,  # [N] token ids
    config: Qwen3Config,
    end_ids: list[int],
    settings: TargetSettings,
    output: Path,
) -> Qwen3ForCausalLM:
    """Train and write the bf16 model to `output`; goes on from a checkpoint there. `end_ids` end a response."""
    torch.manual_seed(settings.seed)
    model = Qwen3ForCausalLM(config).float().train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )
    done = load_state(output, model, optimizer)
    forward = torch.compile(model) if settings.compile else model
    steps, started = settings.steps, time.monotonic()
    for step, batch in enumerate(planned_batches(stream, settings), start=1):
        if step <= done:
            continue
        scale = cosine_with_warmup(step, steps, settings.warmup)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * scale
        loss = next_token_loss(forward, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            speed = (step - done) * settings.batch_tokens / (time.monotonic() - started)
            logger.info("target step %d/%d loss %.3f, %.0f tokens/s", step, steps, loss.item(), speed)
        if step % settings.checkpoint_every == 0:
            save_state(output, step, model, optimizer)
    saved = save_target(model, end_ids, output)
    drop_state(output)
    return saved


def planned_batches(stream: np.ndarray, settings: TargetSettings) -> Iterator[Tensor]:
    """All batches of a training, phase by phase, the same ones for the same seed."""
    rng = random.Random(settings.seed)
    for (length, _), steps in zip(settings.phases, settings.phase_steps, strict=True):
        yield from itertools.islice(windows(stream, length, settings.batch_tokens // length, rng), steps)


def save_target(model: Qwen3ForCausalLM, end_ids: list[int], output: Path) -> Qwen3ForCausalLM:
    """Write config, generation config and bf16 weights to `output`; returns the bf16 copy that was written."""
    copy = Qwen3ForCausalLM(model.config).to(torch.bfloat16).eval()
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(eos_token_id=end_ids, do_sample=False)
    copy.save_pretrained(output)
    return copy
