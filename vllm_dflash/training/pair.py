# SPDX-License-Identifier: Apache-2.0
"""The whole recipe: from a folder of Python files to a target, its drafter and their measured acceptance.

    python -m vllm_dflash.training.pair --output DIR

Stages: tokenizer, target, responses, drafter in two rounds, held-out prompts, acceptance. A stage whose output exists
is skipped and an interrupted training goes on from its checkpoint, so the same command finishes what was begun.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import Qwen3ForCausalLM

from vllm_dflash.hf import DFlashDraftModel
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
)
from vllm_dflash.training.responses import ResponseSettings, read_responses, regenerate, write_responses
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
from vllm_dflash.training.train import DrafterSettings, drafter_config, train_drafter

logger = logging.getLogger(__name__)
NUM_HELD_OUT_PROMPTS = 64
LONGEST_TRAINING_PROMPT = 448  # tokens, of raw prompts: the drafter must know long contexts too


@dataclass(frozen=True)
class PairSettings:
    """Settings of every stage."""

    target: TargetSettings = field(default_factory=TargetSettings)
    responses: ResponseSettings = field(default_factory=ResponseSettings)
    drafter: DrafterSettings = field(default_factory=DrafterSettings)
    second_round: DrafterSettings = DrafterSettings(
        steps=4200, learning_rate=1.5e-3, tokens_per_anchor=12, seed=5, greedy_only=True
    )
    seed: int = 0  # of the choice of prompts


class PairRecipe:
    """The stages over one output folder: target/, drafter/, heldout.jsonl, acceptance.json. work/ is not shipped."""

    def __init__(self, corpus: Path, output: Path, settings: PairSettings) -> None:
        self.settings = settings
        self.target_dir, self.drafter_dir = output / "target", output / "drafter"
        self.responses_file = output / "work" / "responses.jsonl"
        self.first_drafter_dir = output / "work" / "drafter"
        self.prompts_file = output / "heldout.jsonl"
        self.acceptance_file = output / "acceptance.json"
        self.documents: list[Document] = load_documents(corpus)
        self.responses_file.parent.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """All stages in order."""
        stages = (
            (self.make_tokenizer, self.target_dir / "tokenizer.json"),
            (self.make_target, self.target_dir / "model.safetensors"),
            (self.make_responses, self.responses_file),
            (self.make_first_drafter, self.first_drafter_dir / "model.safetensors"),
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

    def make_responses(self) -> None:
        tokenizer, rng = load_tokenizer(self.target_dir), random.Random(self.settings.seed)
        prompts = training_prompts(training_documents(self.documents), tokenizer, LONGEST_TRAINING_PROMPT, rng)
        ends = end_token_ids(tokenizer)
        responses = regenerate(self._target(torch.bfloat16), prompts, ends, self.settings.responses)
        write_responses(responses, self.responses_file)

    def make_first_drafter(self) -> None:
        self._train_drafter(self.settings.drafter, self.first_drafter_dir, None)

    def make_drafter(self) -> None:
        first = DFlashDraftModel.from_pretrained(str(self.first_drafter_dir), dtype=torch.float32)
        self._train_drafter(self.settings.second_round, self.drafter_dir, first)

    def _train_drafter(self, settings: DrafterSettings, output: Path, initial: DFlashDraftModel | None) -> None:
        target = self._target(torch.bfloat16)
        config = drafter_config(target.config, special_id(load_tokenizer(self.target_dir), MASK), settings)
        train_drafter(target, read_responses(self.responses_file), config, settings, output, initial)

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
    parser.add_argument("--response-tokens", type=_positive, default=defaults.responses.tokens)
    parser.add_argument("--drafter-steps", type=_positive, default=defaults.drafter.steps)
    parser.add_argument("--second-round-steps", type=_positive, default=defaults.second_round.steps)
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile (no C++ compiler)")
    arguments = parser.parse_args(argv)
    if not arguments.corpus.is_dir():
        parser.error(f"--corpus {arguments.corpus}: no such folder")
    if arguments.output.exists() and not arguments.output.is_dir():
        parser.error(f"--output {arguments.output}: is a file, a folder is needed")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    compiled = not arguments.no_compile
    settings = PairSettings(
        target=replace(defaults.target, tokens=arguments.target_tokens, compile=compiled),
        responses=replace(defaults.responses, tokens=arguments.response_tokens),
        drafter=replace(defaults.drafter, steps=arguments.drafter_steps, compile=compiled),
        second_round=replace(defaults.second_round, steps=arguments.second_round_steps, compile=compiled),
    )
    PairRecipe(arguments.corpus, arguments.output, settings).run()


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


if __name__ == "__main__":
    main()
