# SPDX-License-Identifier: Apache-2.0
"""The whole recipe: from a folder of Python files to a target, its drafter and their measured acceptance.

    python -m vllm_dflash.training.pair --output DIR

Stages: tokenizer, target, training prompts, drafter (by `vllm-dflash train`), held-out prompts, acceptance. A stage
whose output exists is skipped and an interrupted training goes on from its checkpoint, so the same command finishes
what was begun.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import Qwen3ForCausalLM

from vllm_dflash.hf import DFlashDraftModel
from vllm_dflash.training.command import DrafterRun, TrainOptions
from vllm_dflash.training.corpus import (
    Document,
    default_root,
    held_out_documents,
    load_documents,
    training_documents,
)
from vllm_dflash.training.evaluate import acceptance_records
from vllm_dflash.training.prompts import (
    held_out_prompts,
    read_prompts,
    training_prompts,
    write_prompts,
    write_user_prompts,
)
from vllm_dflash.training.recipe import Recipe, read_recipe
from vllm_dflash.training.target import TargetSettings, target_config, train_target
from vllm_dflash.training.text_stream import token_stream
from vllm_dflash.training.tokenizer import (
    IM_END,
    MASK,
    end_token_ids,
    load_tokenizer,
    save_tokenizer,
    special_id,
    train_tokenizer,
)

logger = logging.getLogger(__name__)
NUM_HELD_OUT_PROMPTS = 64
LONGEST_TRAINING_PROMPT = 448  # tokens, of raw prompts: the drafter must know long contexts too


#: For a target of this size: a small drafter, short contexts. Minutes on a GPU; for a CPU --drafter-config with fewer
#: prompts, steps and tokens a batch.
DRAFTER_RECIPE = {
    "data": {"held_out": 16, "max_prompts": 30000, "max_new_tokens": 256, "max_length": 704, "sampled_share": 0.1},
    "model": {"num_layers": 3, "target_layer_ids": (1, 3, 5, 6), "intermediate_size": 384, "mask_token": MASK},
    "training": {
        "steps": 2000,
        "batch_tokens": 65536,
        "tokens_per_anchor": 8,
        "learning_rate": 2e-3,
        "evaluate_tokens": 64,
    },
}


@dataclass(frozen=True)
class PairSettings:
    """Settings of every stage."""

    target: TargetSettings = field(default_factory=TargetSettings)
    drafter: Recipe = field(default_factory=lambda: Recipe.model_validate(DRAFTER_RECIPE))
    seed: int = 0  # of the choice of prompts


class PairRecipe:
    """The stages over one output folder: target/, drafter/, heldout.jsonl, acceptance.json. work/ is not shipped."""

    def __init__(self, corpus: Path, output: Path, settings: PairSettings) -> None:
        self.settings = settings
        self.target_dir, self.drafter_dir = output / "target", output / "drafter"
        self.training_prompts_file = output / "work" / "prompts.jsonl"
        self.drafter_run_dir = output / "work" / "drafter"
        self.prompts_file = output / "heldout.jsonl"
        self.acceptance_file = output / "acceptance.json"
        self.documents: list[Document] = load_documents(corpus)
        self.training_prompts_file.parent.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """All stages in order."""
        stages = (
            (self.make_tokenizer, self.target_dir / "tokenizer.json"),
            (self.make_target, self.target_dir / "model.safetensors"),
            (self.make_training_prompts, self.training_prompts_file),
            (self.make_drafter, self.drafter_dir / "model.safetensors"),
            (self.make_prompts, self.prompts_file),
            (self.measure, self.acceptance_file),
        )
        for number, (stage, product) in enumerate(stages, start=1):
            verb = "skipped, is there" if product.exists() else "started"
            logger.info("stage %d/%d, %s: %s", number, len(stages), product, verb)
            if not product.exists():
                stage()

    def make_tokenizer(self) -> None:
        texts = (document.text for document in training_documents(self.documents))
        save_tokenizer(train_tokenizer(texts), self.target_dir)

    def make_target(self) -> None:
        tokenizer, settings = load_tokenizer(self.target_dir), self.settings.target
        rng = random.Random(settings.seed)
        stream = token_stream(training_documents(self.documents), tokenizer, settings.chat_share, rng)
        config = target_config(tokenizer.get_vocab_size(), special_id(tokenizer, IM_END))
        train_target(stream, config, end_token_ids(tokenizer), settings, self.target_dir)

    def make_training_prompts(self) -> None:
        tokenizer, rng = load_tokenizer(self.target_dir), random.Random(self.settings.seed)
        prompts = training_prompts(training_documents(self.documents), tokenizer, LONGEST_TRAINING_PROMPT, rng)
        write_user_prompts(rng.sample(prompts, len(prompts)), self.training_prompts_file)

    def make_drafter(self) -> None:
        """By `vllm-dflash train`, whose own files stay behind in work/."""
        options = TrainOptions(
            target=str(self.target_dir),
            prompts=(str(self.training_prompts_file),),
            output=self.drafter_run_dir,
            recipe=self.settings.drafter,
        )
        DrafterRun(options).run()
        self.drafter_dir.mkdir(exist_ok=True)
        for name in ("config.json", "README.md"):
            shutil.copy(self.drafter_run_dir / name, self.drafter_dir / name)
        # In one move, and last: it is what says that this stage is done.
        (self.drafter_run_dir / "model.safetensors").rename(self.drafter_dir / "model.safetensors")

    def make_prompts(self) -> None:
        tokenizer = load_tokenizer(self.target_dir)
        documents = held_out_documents(self.documents)
        write_prompts(
            held_out_prompts(documents, tokenizer, NUM_HELD_OUT_PROMPTS, self.settings.seed), self.prompts_file
        )

    def measure(self) -> None:
        draft = DFlashDraftModel.from_pretrained(str(self.drafter_dir), dtype=torch.float32).eval()
        ends = end_token_ids(load_tokenizer(self.target_dir))
        records = acceptance_records(draft, self._target(torch.float32), read_prompts(self.prompts_file), 128, ends)
        for record in records:
            logger.info("%s", json.dumps(record))
        self.acceptance_file.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")

    def _target(self, dtype: torch.dtype) -> Qwen3ForCausalLM:
        return Qwen3ForCausalLM.from_pretrained(self.target_dir, dtype=dtype).eval()


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and run every stage that is not done yet."""
    defaults = PairSettings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the pair; an unfinished one is finished")
    parser.add_argument("--corpus", type=Path, default=default_root(), help="folder of .py files")
    parser.add_argument("--target-tokens", type=_positive, default=defaults.target.tokens)
    parser.add_argument("--drafter-config", type=Path, help="recipe of the drafter; default: one for this target")
    parser.add_argument("--no-compile", action="store_true", help="train the target without torch.compile")
    arguments = parser.parse_args(argv)
    if not arguments.corpus.is_dir():
        parser.error(f"--corpus {arguments.corpus}: no such folder")
    if arguments.output.exists() and not arguments.output.is_dir():
        parser.error(f"--output {arguments.output}: is a file, a folder is needed")
    try:
        recipe = (
            None if arguments.drafter_config is None else read_recipe(arguments.drafter_config, flag="--drafter-config")
        )
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    target = replace(defaults.target, tokens=arguments.target_tokens, compile=not arguments.no_compile)
    settings = PairSettings(target, recipe or defaults.drafter)
    PairRecipe(arguments.corpus, arguments.output, settings).run()


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


if __name__ == "__main__":
    main()
