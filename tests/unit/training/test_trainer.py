# SPDX-License-Identifier: Apache-2.0
"""Tiny trainings: the loss falls, drafts get accepted, a kill changes nothing, the best drafter stays."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import counting_responses, plain_loss, tiny_target
from trainer_child import MASK_ID, RECIPE, made_trainer

from vllm_dflash.hf import DFlashDraftModel
from vllm_dflash.training.blocks import DraftedBlocks
from vllm_dflash.training.data import collate
from vllm_dflash.training.evaluate import Acceptance
from vllm_dflash.training.feature_writing import write_cache
from vllm_dflash.training.recipe import Recipe

CHILD = Path(__file__).with_name("trainer_child.py")


def changed(**training: object) -> Recipe:
    return RECIPE.model_copy(update={"training": RECIPE.training.model_copy(update=training)})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return DFlashDraftModel.from_pretrained(str(folder), dtype=torch.float32).state_dict()


def test_the_loss_falls_and_the_drafter_loads(tmp_path: Path) -> None:
    """Held against the plain weighted cross-entropy of all rows at once."""
    trainer = made_trainer(tmp_path, changed(steps=80, learning_rate=0.02, accumulation=1))
    before = trainer._loss(1, 0).item()
    trainer.run()
    assert trainer._loss(1, 0).item() < 0.3 * before
    loaded = DFlashDraftModel.from_pretrained(str(tmp_path), dtype=torch.float32)
    assert (loaded.block_size, loaded.mask_token_id, loaded.target_layer_ids) == (4, MASK_ID, (0, 2))


def test_the_loss_is_that_of_all_rows_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = made_trainer(tmp_path)
    seen = {}

    def kept(blocks, last):
        seen["blocks"] = blocks
        return type(trainer)._blocks_loss(trainer, blocks, last)

    monkeypatch.setattr(trainer, "_blocks_loss", kept)
    monkeypatch.setattr("vllm_dflash.training.trainer._LOGITS_BYTES", 7 * 32 * 4)  # several pieces
    loss = trainer._loss(1, 0)
    logits = tiny_target().lm_head(seen["blocks"].hidden)
    assert loss.item() == pytest.approx(plain_loss(logits, seen["blocks"].labels, 4.0), rel=1e-5)


def test_the_target_s_distribution_is_met_at_the_rows_that_predict(tmp_path: Path) -> None:
    """A drafter whose hidden states are the target's own has no distance to it."""
    recipe = RECIPE.model_copy(update={"objective": RECIPE.objective.model_copy(update={"kl_weight": 1.0})})
    trainer, target = made_trainer(tmp_path, recipe), tiny_target()
    batch = collate(counting_responses(4), 40)
    last = target.model(batch.token_ids).last_hidden_state
    anchors = torch.tensor([[8, 20], [9, 30], [12, 13], [10, 36]])
    positions = anchors[..., None] + torch.arange(3)
    hidden = last[torch.arange(4)[:, None, None], positions]
    labels = batch.token_ids[torch.arange(4)[:, None, None], positions + 1]
    assert trainer._blocks_loss(DraftedBlocks(hidden, labels, anchors), last).item() == pytest.approx(0.0, abs=1e-5)
    assert trainer._blocks_loss(DraftedBlocks(hidden, labels, anchors + 1), last).item() > 0.1


def test_cached_features_train_the_same_drafter(tmp_path: Path) -> None:
    made_trainer(tmp_path / "online", changed(steps=3)).run()
    target, responses = tiny_target(), counting_responses(16)
    folder = tmp_path / "target"
    target.save_pretrained(folder)
    cache = write_cache(
        tmp_path / "cache", target, responses, (0, 2), max_length=40, dtype=torch.float32, target_dir=folder
    )
    made_trainer(tmp_path / "cached", changed(steps=3), read_features=cache.batch).run()
    cached = weights(tmp_path / "cached")
    for name, weight in weights(tmp_path / "online").items():
        torch.testing.assert_close(cached[name], weight, rtol=0.02, atol=1e-3)


def test_the_best_drafter_stays(tmp_path: Path) -> None:
    lengths = iter([Acceptance(10, (5, 0, 0)), Acceptance(10, (9, 8, 0)), Acceptance(10, (7, 1, 0))])
    kept = []

    def evaluate(draft: DFlashDraftModel) -> Acceptance:
        assert not draft.training and draft.dtype == torch.float32
        kept.append({name: weight.clone() for name, weight in draft.state_dict().items()})
        return next(lengths)

    state = made_trainer(tmp_path, changed(steps=6, evaluate_every=2), evaluate).run()
    assert (state.best_step, state.best.length) == (4, pytest.approx(2.7))
    for name, weight in weights(tmp_path).items():
        assert torch.equal(weight, kept[1][name].to(torch.bfloat16).float()), name


def test_acceptance_is_logged_by_position(tmp_path: Path) -> None:
    lengths = iter([Acceptance(10, (5, 4, 0)), Acceptance(8, (6, 4, 2))])
    state = made_trainer(tmp_path, changed(steps=4, evaluate_every=2), lambda draft: next(lengths)).run()
    events = EventAccumulator(str(tmp_path / "logs" / "drafter")).Reload()
    logged = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert {tag for tag in logged if tag.startswith("acceptance/")} == {f"acceptance/position_{k}" for k in (1, 2, 3)}
    # 5, 4 and 0 of 10 drafts, then 6, 4 and 2 of 8
    expected = {"position_1": (0.5, 0.75), "position_2": (0.4, 0.5), "position_3": (0.0, 0.25)}
    for name, (first, last) in expected.items():
        assert logged[f"acceptance/{name}"] == [(2, pytest.approx(first)), (4, pytest.approx(last))]
    assert logged["acceptance_length"] == [(2, pytest.approx(1.9)), (4, pytest.approx(2.5))]
    of_best = [logged[f"acceptance/position_{k}"][-1][1] for k in (1, 2, 3)]
    assert state.best_step == 4 and state.best.per_position == pytest.approx(of_best)


def test_what_goes_wrong_in_the_evaluation_does_not_cost_the_training(tmp_path: Path) -> None:
    def broken(draft: DFlashDraftModel) -> Acceptance:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        made_trainer(tmp_path, changed(steps=3), broken).run()
    trainer = made_trainer(tmp_path, changed(steps=3))
    trainer._train_step = lambda step: pytest.fail("trained again")
    assert trainer.run().best_step == 3 and (tmp_path / "model.safetensors").is_file()


def test_killed_at_any_step_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    made_trainer(tmp_path / "whole").run()
    at = random.randint(3, 8)
    command = [sys.executable, str(CHILD), str(tmp_path / "cut")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) == at:
            child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, f"killed in step {at}"
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    resumed = made_trainer(tmp_path / "cut")
    resumed._resume()
    assert resumed.state.step in (at - 1, at - 2), "from the last checkpoint"
    made_trainer(tmp_path / "cut").run()
    cut = weights(tmp_path / "cut")
    for name, weight in weights(tmp_path / "whole").items():
        assert torch.equal(weight, cut[name]), f"{name}, killed in step {at}"


def test_two_ranks_train_as_one_that_accumulates_their_batches(tmp_path: Path) -> None:
    made_trainer(tmp_path / "one").run()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    subprocess.run([*launch, str(CHILD), str(tmp_path / "two"), "1"], check=True, timeout=200, env=environment)
    two = weights(tmp_path / "two")
    for name, weight in weights(tmp_path / "one").items():
        torch.testing.assert_close(two[name], weight, rtol=0.01, atol=1e-5)  # as saved, in bf16


def test_ranks_that_do_not_know_of_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, and accelerate has joined 1"):
        made_trainer(tmp_path)


def test_epochs_give_the_steps(tmp_path: Path) -> None:
    """16 sequences of 40 in batches of 160 tokens are four batches, two of them a step."""
    trainer = made_trainer(tmp_path, changed(steps=None, epochs=2.5))
    assert trainer.plan.epoch_size == 4 and trainer.num_steps == 5
