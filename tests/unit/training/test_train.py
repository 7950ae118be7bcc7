# SPDX-License-Identifier: Apache-2.0
"""Tiny trainings: the loss falls, what is written loads again, an interruption changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_training import MASK_ID, VOCAB_SIZE, counting_responses, tiny_target
from transformers import GenerationConfig

from vllm_dflash.hf import DFlashDraftModel
from vllm_dflash.training.checkpoint import STATE_FILE
from vllm_dflash.training.data import collate
from vllm_dflash.training.loss import block_accuracy, block_loss
from vllm_dflash.training.schedule import cosine_with_warmup
from vllm_dflash.training.target import TargetSettings, next_token_loss, train_target
from vllm_dflash.training.train import DrafterSettings, draft_batch, drafter_config, train_drafter

SETTINGS = DrafterSettings(
    num_layers=1,
    intermediate_size=48,
    target_layer_ids=(0, 2),
    block_size=4,
    steps=200,
    batch_tokens=320,
    tokens_per_anchor=5,
    buckets=(20, 40),
    learning_rate=2e-2,
    compile=False,
)


def measure(draft, target):
    batch = collate(counting_responses(8), 40)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        logits, labels = draft_batch(draft, target, batch, SETTINGS, MASK_ID, generator)
    return block_loss(logits, labels, SETTINGS.gamma).item(), block_accuracy(logits, labels).run


def test_drafter_learns_a_pattern_and_loads_again(tmp_path):
    target = tiny_target()
    config = drafter_config(target.config, MASK_ID, SETTINGS)
    torch.manual_seed(0)
    loss_before, run_before = measure(DFlashDraftModel(config), target)
    trained = train_drafter(target, counting_responses(64), config, SETTINGS, tmp_path)
    loaded = DFlashDraftModel.from_pretrained(str(tmp_path), dtype=torch.float32).eval()
    loss, run = measure(loaded, target)
    assert loss < 0.3 * loss_before
    assert run > 2.5 > run_before  # of 3
    assert loaded.target_layer_ids == (0, 2) and loaded.block_size == 4 and loaded.mask_token_id == MASK_ID
    for name, weight in trained.state_dict().items():
        assert torch.equal(weight.float(), loaded.state_dict()[name]), name


def test_rows_1_to_k_are_judged_and_the_anchor_row_is_not():
    """A drafter whose hidden state names its own row: the logits must come from rows 1..3 of each block of 4."""
    target, seen = tiny_target(), {}

    def draft(position_ids, noise_embedding, target_hidden, attention_mask):
        seen.update(position_ids=position_ids, noise=noise_embedding, context=target_hidden, mask=attention_mask)
        return (torch.arange(noise_embedding.shape[1]) % 4).float()[None, :, None].expand(8, -1, 32)

    batch = collate(counting_responses(8), 40)
    logits, labels = draft_batch(draft, target, batch, SETTINGS, MASK_ID, torch.Generator().manual_seed(0))
    blocks = 40 // 5
    head_sums = target.lm_head.weight.sum(dim=1)  # [V]: the logits of a hidden state of ones
    expected = torch.tensor([1.0, 2.0, 3.0])[:, None] * head_sums
    torch.testing.assert_close(logits.float(), expected.expand(8, blocks, 3, -1), rtol=0.05, atol=0.1)  # bf16
    # Counting responses: the token at position p of sequence b is 4 + (b + p) % 28, so labels follow from positions.
    positions = seen["position_ids"][:, 40:].view(8, blocks, 4)
    counted = 4 + (torch.arange(8)[:, None, None] + positions[..., 1:]) % 28
    known = positions[..., 1:] < 40
    assert torch.equal(labels, torch.where(known, counted, -100))
    assert torch.equal(seen["position_ids"][:, :40], torch.arange(40).expand(8, -1))
    assert seen["mask"].shape == (8, 1, 4 * blocks, 40 + 4 * blocks)
    mask_embedding = target.model.embed_tokens.weight[MASK_ID]
    assert torch.equal(seen["noise"].view(8, blocks, 4, -1)[:, :, 1:], mask_embedding.expand(8, blocks, 3, -1))


def test_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    target, settings = tiny_target(), replace(SETTINGS, steps=8, checkpoint_every=3)
    config, responses = drafter_config(target.config, MASK_ID, settings), counting_responses(16)
    whole = train_drafter(target, responses, config, settings, tmp_path / "whole")

    calls = 0

    def interrupted(step, steps, warmup):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return cosine_with_warmup(step, steps, warmup)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("vllm_dflash.training.train.cosine_with_warmup", interrupted)
        train_drafter(target, responses, config, settings, tmp_path / "cut")
    assert (tmp_path / "cut" / STATE_FILE).exists() and not (tmp_path / "cut" / "model.safetensors").exists()
    resumed = train_drafter(target, responses, config, settings, tmp_path / "cut")
    assert not (tmp_path / "cut" / STATE_FILE).exists()
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_second_round_starts_from_the_first_and_keeps_to_greedy_responses(tmp_path):
    target = tiny_target()
    config, responses = drafter_config(target.config, MASK_ID, SETTINGS), counting_responses(8)
    first = train_drafter(target, responses, config, replace(SETTINGS, steps=2), tmp_path / "first")
    still = replace(SETTINGS, steps=1, learning_rate=0.0, greedy_only=True)
    second = train_drafter(target, responses, config, still, tmp_path / "second", first)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
    sampled = [replace(response, temperature=0.7) for response in responses]
    with pytest.raises(ValueError, match="none of 0 responses"):
        train_drafter(target, sampled, config, still, tmp_path / "third", first)


def test_target_is_left_as_it_was(tmp_path):
    target = tiny_target()
    before = {name: weight.clone() for name, weight in target.state_dict().items()}
    config = drafter_config(target.config, MASK_ID, SETTINGS)
    train_drafter(target, counting_responses(8), config, replace(SETTINGS, steps=2), tmp_path)
    assert all(torch.equal(weight, before[name]) for name, weight in target.state_dict().items())


def test_target_training_lowers_the_loss(tmp_path):
    stream = np.array([4 + i % 28 for i in range(3000)], dtype=np.uint16)
    settings = TargetSettings(
        tokens=15_360, batch_tokens=256, learning_rate=1e-2, phases=((32, 0.9), (64, 0.1)), compile=False
    )
    assert settings.phase_steps == [54, 6]
    untrained = tiny_target()
    batch = torch.from_numpy(stream[:132].astype(np.int64)).view(4, 33)
    before = next_token_loss(untrained, batch).item()
    trained = train_target(stream, untrained.config, [2, 0], settings, tmp_path)
    assert next_token_loss(trained, batch).item() < 0.3 * before
    assert trained(torch.tensor([[5, 6, 7, 8]])).logits[0, -1].argmax().item() == 9
    assert trained.config.vocab_size == VOCAB_SIZE
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2, 0]


def test_schedule_warms_up_and_falls_to_zero():
    factors = [cosine_with_warmup(step, 100, 0.04) for step in range(1, 101)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[51] == pytest.approx(0.5)  # step 52: half of the 96 steps after the warm-up
    assert factors[99] == pytest.approx(0.0)
