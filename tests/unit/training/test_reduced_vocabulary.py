# SPDX-License-Identifier: Apache-2.0
"""A drafter over part of the vocabulary: which tokens, what it is taught, that it serves and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import VOCAB_SIZE, counting_responses, tiny_target
from torch import nn
from trainer_child import RECIPE, made_trainer

from vllm_dflash.hf import DFlashDraftModel
from vllm_dflash.training.anchors import IGNORED
from vllm_dflash.training.blocks import DraftedBlocks
from vllm_dflash.training.drafter_shape import new_drafter_config
from vllm_dflash.training.recipe import ModelRecipe, Recipe
from vllm_dflash.training.reduced_vocabulary import choose_vocabulary, coverage, draft_labels, take_rows
from vllm_dflash.training.responses import Response

pytestmark = pytest.mark.usefixtures("one_thread")

#: Of the 32; 2 ends a text.
KEPT = [0, 2, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 17, 18, 19, 20, 23, 29, 30, 31]


def reduced(objective: dict[str, Any] | None = None, **training: Any) -> Recipe:
    settings = RECIPE.model_dump(exclude_unset=True)
    settings["model"] |= {"draft_vocab_size": len(KEPT)}
    settings["training"] |= training
    return Recipe.model_validate(settings | {"objective": objective or {}})


# Which tokens.

#: Behind the first token, which is never drafted: 5, 6 and 7 twice, 8 once.
RESPONSES = [Response([1, 1, 1], [9, 5, 5, 7, 8], 0.0), Response([1], [9, 7, 6, 6], 0.7)]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        pytest.param(3, [2, 5, 6], id="of equally common ones the lower ids"),
        pytest.param(4, [2, 5, 6, 7], id="no first tokens and no prompts"),
        pytest.param(5, [2, 5, 6, 7, 8], id="all of the responses"),
        pytest.param(7, [0, 1, 2, 5, 6, 7, 8], id="filled up with the lowest"),
        pytest.param(12, list(range(12)), id="all"),
    ],
)
def test_the_commonest_tokens_and_the_end(size: int, expected: list[int]) -> None:
    assert choose_vocabulary(RESPONSES, size, 12, [2]) == expected


def test_a_common_end_token_takes_one_place() -> None:
    assert choose_vocabulary(RESPONSES, 3, 12, [7, 11]) == [5, 7, 11]


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"^model.draft_vocab_size = 13, but the target has 12 tokens$"):
        choose_vocabulary(RESPONSES, 13, 12, [2])
    with pytest.raises(ValueError, match=r"model.draft_vocab_size = 1 has no room for the target's 2 stop tokens"):
        choose_vocabulary(RESPONSES, 1, 12, [2, 3])
    with pytest.raises(ValueError, match=r"model.draft_vocab_size = 2: none of the responses' 4 tokens has a place"):
        choose_vocabulary(RESPONSES, 2, 12, [2, 3])


def small_drafter(token_ids: list[int], target: nn.Module) -> DFlashDraftModel:
    model = ModelRecipe(num_layers=1, block_size=4, target_layer_ids=(0, 2), draft_vocab_size=len(token_ids))
    draft = DFlashDraftModel(new_drafter_config(target, model, 3))
    take_rows(draft, target, token_ids)
    return draft


def test_coverage_is_of_what_is_to_be_drafted() -> None:
    found = coverage(small_drafter([2, 5, 6], tiny_target()), RESPONSES)
    assert found is not None and found.share == 4 / 7
    assert str(found) == "3 of the target's 32 tokens, 57.14% of what is to be drafted"
    whole = DFlashDraftModel(new_drafter_config(tiny_target(), ModelRecipe(num_layers=1, target_layer_ids=(0,)), 3))
    assert coverage(whole, RESPONSES) is None


def test_the_layout_is_the_published_one() -> None:
    """Offsets, as `tests/unit/test_hf_model.py` reads them from others' checkpoints."""
    target = tiny_target()
    draft = small_drafter([2, 5, 6, 31], target)
    assert draft.d2t.tolist() == [2, 4, 4, 28] and draft.draft_token_ids.tolist() == [2, 5, 6, 31]
    assert torch.equal(draft.lm_head.weight, target.lm_head.weight[[2, 5, 6, 31]])


def test_a_bias_has_no_place() -> None:
    target = tiny_target()
    target.lm_head = nn.Linear(32, VOCAB_SIZE)
    with pytest.raises(ValueError, match=r"model.draft_vocab_size = 3: the target's LM head has a bias"):
        small_drafter([2, 5, 6], target)


# What is taught.


def test_a_block_ends_before_what_cannot_be_drafted() -> None:
    none = IGNORED
    labels = torch.tensor([[[5, 2, 7], [2, none, none], [6, 5, 5]], [[7, 0, 5], [none, none, none], [7, 5, 9]]])
    found = draft_labels(labels, torch.tensor([7, 2, 5]), 10)
    expected = [[[2, 1, 0], [1, none, none], [none] * 3], [[0, none, none], [none] * 3, [0, 2, none]]]
    assert found.tolist() == expected


def plain_loss(
    blocks: DraftedBlocks,
    last: torch.Tensor,  # [B, S, H]
    recipe: Recipe,
) -> float:
    """Row by row, by the formulas: over the kept columns of the target's logits, up to the first other label."""
    head, objective = tiny_target().lm_head, recipe.objective
    total, divisor = 0.0, 0.0
    for b, n in torch.cartesian_prod(*map(torch.arange, blocks.anchors.shape)).tolist():
        losses, confidences = [], []
        for k, label in enumerate(blocks.labels[b, n].tolist()):
            if label not in KEPT:
                break
            row = head(blocks.hidden[b, n, k])[KEPT].log_softmax(0)
            entropy = nn.functional.cross_entropy(row[None], torch.tensor([KEPT.index(label)]))
            wanted = head(last[b, blocks.anchors[b, n] + k]).softmax(0)[KEPT]
            wanted = wanted / wanted.sum()
            distance = (wanted * (wanted.log() - row)).sum()
            losses.append((1 - objective.kl_weight) * entropy.item() + objective.kl_weight * distance.item())
            confidences.append(objective.alpha + (1 - objective.alpha) * row.exp()[KEPT.index(label)].item())
        reached = [float(torch.tensor(confidences[: m + 1]).prod()) for m in range(len(losses))]
        by_position = [float(torch.tensor(-k / 4.0).exp()) for k in range(len(losses))]
        weights = by_position if objective.kind == "decay" else [sum(reached[k:]) for k in range(len(losses))]
        total += sum(w * loss for w, loss in zip(weights, losses, strict=True))
        divisor += sum(weights) if objective.kind == "decay" else bool(losses)
    return total / divisor


@pytest.mark.parametrize("kind", ["decay", "d-pace"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_the_loss_is_that_of_the_chosen_rows_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, kl_weight: float
) -> None:
    recipe = reduced({"kind": kind, "kl_weight": kl_weight})
    trainer, seen = made_trainer(tmp_path, recipe, vocabulary=KEPT), {}

    def kept(blocks: DraftedBlocks, last: torch.Tensor) -> torch.Tensor:
        seen["all"] = blocks, last
        return type(trainer)._blocks_loss(trainer, blocks, last)

    monkeypatch.setattr(trainer, "_blocks_loss", kept)
    monkeypatch.setattr("vllm_dflash.training.trainer._LOGITS_BYTES", 7 * 32 * 4)  # several pieces
    loss = trainer._loss(1, 0)
    with torch.no_grad():
        expected = plain_loss(*seen["all"], recipe)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


# From training to serving.


def test_a_run_that_was_cut_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, cut = (made_trainer(tmp_path / name, reduced(), vocabulary=KEPT) for name in ("whole", "cut"))
    whole.run()
    train_step = cut._train_step

    def until_the_sixth(step: int) -> None:
        if step == 6:
            raise KeyboardInterrupt
        train_step(step)

    cut._train_step = until_the_sixth
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    assert [folder.name for folder in (tmp_path / "cut" / "work").iterdir()] == ["checkpoint-4"]
    resumed = made_trainer(tmp_path / "cut", reduced(), vocabulary=KEPT)
    resumed.run()
    weights, again = whole._own.state_dict(), resumed._own.state_dict()
    assert {"lm_head.weight", "d2t"} <= weights.keys() and weights["fc.weight"].dtype == torch.float32
    for name, weight in weights.items():
        assert torch.equal(weight, again[name]), name
    served, of_cut = (DFlashDraftModel.from_pretrained(str(tmp_path / name)).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(weight, of_cut[name]) for name, weight in served.items())


def own_responses(target: Any, count: int) -> list[Response]:
    """What the target says greedily."""
    prompts = [response.prompt_token_ids for response in counting_responses(count)]
    written = target.generate(torch.tensor(prompts), max_new_tokens=32, do_sample=False)
    return [Response(ids, row[8:], 0.0) for ids, row in zip(prompts, written.tolist(), strict=True)]


def test_trained_it_drafts_what_it_can_and_the_text_is_the_target_s(tmp_path: Path) -> None:
    target = tiny_target()
    responses = own_responses(target, 16)
    common = choose_vocabulary(responses, len(KEPT), VOCAB_SIZE, [2])
    made_trainer(tmp_path, reduced(steps=150, accumulation=1), responses=responses, vocabulary=common).run()
    draft = DFlashDraftModel.from_pretrained(str(tmp_path), dtype=torch.float32)
    assert draft.draft_token_ids.tolist() == common
    assert torch.equal(draft.lm_head.weight, target.lm_head.weight[common].bfloat16().float())
    others, accepted = 0, []
    for response in responses[:6]:
        found = draft.spec_generate(
            torch.tensor([response.prompt_token_ids]), target, max_new_tokens=32, return_stats=True
        )
        tokens = found.sequences[0, 8:].tolist()
        assert tokens == response.token_ids
        others += len(set(tokens) - set(common))
        accepted += found.acceptance_lengths
    assert others > 0, "the text has tokens that cannot be drafted"
    assert sum(accepted) / len(accepted) > 2.0
