# SPDX-License-Identifier: Apache-2.0
"""Training of a toy target: the loss falls, and the rate follows its schedule."""

import numpy as np
import pytest
import torch
from tiny_training import VOCAB_SIZE, tiny_target
from transformers import GenerationConfig

from vllm_dflash.training.checkpoint import STATE_FILE
from vllm_dflash.training.schedule import cosine_with_warmup
from vllm_dflash.training.target import TargetSettings, next_token_loss, train_target


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


def test_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    stream = np.array([4 + i % 28 for i in range(3000)], dtype=np.uint16)
    settings = TargetSettings(tokens=2048, batch_tokens=256, phases=((32, 1.0),), compile=False, checkpoint_every=3)
    config, calls = tiny_target().config, []
    whole = train_target(stream, config, [2], settings, tmp_path / "whole")

    def interrupted(step, steps, warmup):
        calls.append(step)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return cosine_with_warmup(step, steps, warmup)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("vllm_dflash.training.target.cosine_with_warmup", interrupted)
        train_target(stream, config, [2], settings, tmp_path / "cut")
    assert (tmp_path / "cut" / STATE_FILE).exists() and not (tmp_path / "cut" / "model.safetensors").exists()
    resumed = train_target(stream, config, [2], settings, tmp_path / "cut")
    assert not (tmp_path / "cut" / STATE_FILE).exists()
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_schedule_warms_up_and_falls_to_zero():
    factors = [cosine_with_warmup(step, 100, 0.04) for step in range(1, 101)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[51] == pytest.approx(0.5)  # step 52: half of the 96 steps after the warm-up
    assert factors[99] == pytest.approx(0.0)
