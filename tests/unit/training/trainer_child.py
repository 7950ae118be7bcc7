# SPDX-License-Identifier: Apache-2.0
"""A tiny training, as a process that can be killed: `python trainer_child.py OUTPUT`. Says each step on its stdout.

A second argument is the number of batches that each rank accumulates in a step.
"""

import sys
from pathlib import Path

from tiny_training import counting_responses, tiny_target

from vllm_dflash.hf import DFlashDraftModel
from vllm_dflash.training import trainer
from vllm_dflash.training.drafter_shape import new_drafter_config
from vllm_dflash.training.evaluate import Acceptance
from vllm_dflash.training.recipe import Recipe
from vllm_dflash.training.reduced_vocabulary import take_rows

RECIPE = Recipe.model_validate(
    {
        "data": {"max_length": 40},
        "model": {"num_layers": 1, "block_size": 4, "target_layer_ids": [0, 2]},
        "training": {
            "steps": 9,
            "batch_tokens": 160,
            "accumulation": 2,
            "tokens_per_anchor": 5,
            "learning_rate": 0.02,
            "checkpoint_every": 2,
            "precision": "fp32",
        },
    }
)
MASK_ID = 3


def made_trainer(
    output,
    recipe=RECIPE,
    evaluate=lambda draft: Acceptance(10, (5, 2, 1)),
    responses=None,
    vocabulary=None,  # token ids, where the recipe's drafter has one of its own
    **more,
):
    import torch

    target = tiny_target()
    torch.manual_seed(recipe.training.seed)
    draft = DFlashDraftModel(new_drafter_config(target, recipe.model, MASK_ID))
    if vocabulary is not None:
        take_rows(draft, target, vocabulary)
    return trainer.DrafterTrainer(target, draft, responses or counting_responses(16), recipe, output, evaluate, **more)


if __name__ == "__main__":
    accumulation = {"accumulation": int(sys.argv[2])} if len(sys.argv) > 2 else {}
    training = RECIPE.training.model_copy(update=accumulation)
    made = made_trainer(Path(sys.argv[1]), RECIPE.model_copy(update={"training": training}))
    train_step = made._train_step

    def told(step):
        print(step, flush=True)
        train_step(step)

    made._train_step = told
    made.run()
