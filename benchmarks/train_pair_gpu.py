# SPDX-License-Identifier: Apache-2.0
"""Trains a pair on the spot, in a few minutes on one GPU: a Qwen3-style target of 103M parameters and its drafter.

    python benchmarks/train_pair_gpu.py --output DIR

For measurements with real acceptance where no checkpoint can be fetched. Text is the Python source code found on the
machine. The target trains by the clock (--target-seconds); the drafter by `vllm-dflash train`, on what the target
answers to --prompts prompts. Writes target/, drafter/ and heldout.jsonl (prompts from files that neither model has
seen) to --output. The last line is JSON: the seconds of each stage, and acceptance length on held-out prompts.

A smoke test on a CPU:

    python benchmarks/train_pair_gpu.py --output DIR --hidden-size 64 --num-layers 2 --vocab-size 1024 \
        --corpus-megabytes 3 --held-out 16 --target-seconds 10 --drafter-layers 1 --evaluate 4
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu.train_command import train_drafter
from tokenizers import Tokenizer
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from vllm_dflash.hf import DFlashDraftModel
from vllm_dflash.training.corpus import (
    Document,
    default_root,
    held_out_documents,
    is_held_out,
    load_documents,
    training_documents,
)
from vllm_dflash.training.evaluate import acceptance
from vllm_dflash.training.prompts import held_out_prompts, training_prompts, write_prompts, write_user_prompts
from vllm_dflash.training.schedule import cosine_with_warmup
from vllm_dflash.training.target import next_token_loss, save_target, target_config
from vllm_dflash.training.text_stream import token_stream, windows
from vllm_dflash.training.tokenizer import (
    END_OF_TEXT,
    IM_END,
    end_token_ids,
    save_tokenizer,
    special_id,
    train_tokenizer,
)

HEAD_DIM = 64
MAX_LENGTH = 2048
LONGEST_PROMPT = 448  # tokens, of training prompts: the drafter must know long contexts too
MEASURED_TOKENS = 128  # of each held-out prompt
TOKENIZER_CHARACTERS = 12_000_000
CHAT_CHARACTERS = 10_000_000  # of source code from which conversations are cut
PROMPT_CHARACTERS = 6_000_000  # of source code that prompts are cut from
REPORT_EVERY_S = 5.0


def main() -> None:
    args = parse_arguments()
    disable_progress_bar()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    recipe = Recipe(args)
    with recipe.stage("corpus, tokenizer, token stream"):
        recipe.prepare()
    with recipe.stage("target"):
        recipe.train_target()
    with recipe.stage("prompts"):
        recipe.write_prompts()
    gc.collect()  # vLLM, which writes the responses, wants the GPU's memory
    torch.cuda.empty_cache()
    with recipe.stage("drafter"):
        recipe.train_drafter()
    if args.evaluate:
        with recipe.stage("acceptance"):
            recipe.measure()
    print(json.dumps(recipe.facts), flush=True)


def parse_arguments() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--target-seconds", type=float, default=90)
    parser.add_argument("--prompts", type=int, default=12_000 if cuda else 100, help="that the target answers")
    parser.add_argument("--drafter-steps", type=int, default=1200 if cuda else 50)
    parser.add_argument("--hidden-size", type=int, default=768, help="a multiple of 64")
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--drafter-layers", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--corpus-megabytes", type=float, default=40)
    parser.add_argument("--held-out", type=int, default=64, help="prompts in heldout.jsonl")
    parser.add_argument("--batch-tokens", type=int, default=32768 if cuda else 2048, help="a step of either training")
    parser.add_argument("--response-tokens", type=int, default=256 if cuda else 64, help="longest response")
    parser.add_argument(
        "--feature-cache-gb", type=float, metavar="GIB", help="disk for the target's features; default: none are kept"
    )
    parser.add_argument("--target-lr", type=float, default=1.5e-3)
    parser.add_argument("--drafter-lr", type=float, default=1e-3)
    parser.add_argument(
        "--compile", action="store_true", help="compile the target's layers: faster steps, a slower start"
    )
    parser.add_argument("--evaluate", type=int, default=16, help="held-out prompts to measure acceptance on")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    args = parser.parse_args()
    if args.hidden_size % HEAD_DIM:
        parser.error(f"--hidden-size {args.hidden_size}: not a multiple of {HEAD_DIM}")
    return args


class Clock:
    """The time a training may take, and how far it has got."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.started = seconds, time.monotonic()
        self.reported = self.started

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def steps(self) -> Iterator[int]:
        """1, 2, ... until the time is up; at least one."""
        for step in itertools.count(1):
            yield step
            if self.elapsed > self.seconds:
                return

    def factor(self) -> float:
        """The learning rate's factor: the usual schedule, with time for steps."""
        return cosine_with_warmup(1 + int(1000 * min(1.0, self.elapsed / self.seconds)), 1000, 0.03)

    def wants_report(self) -> bool:
        due = time.monotonic() - self.reported >= REPORT_EVERY_S or self.elapsed > self.seconds
        if due:
            self.reported = time.monotonic()
        return due


class StageTimer:
    """Prints when a stage begins and ends."""

    def __init__(self, name: str, seconds: dict[str, float]) -> None:
        self.name, self.seconds = name, seconds

    def __enter__(self) -> None:
        self.started = time.monotonic()
        print(f"== {self.name}", flush=True)

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = round(time.monotonic() - self.started, 1)
        print(f"== {self.name}: {self.seconds[self.name]} s", flush=True)


class Recipe:
    """The stages over one output folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device, self.rng = args, torch.device(args.device), random.Random(0)
        self.seconds: dict[str, float] = {}
        self.facts: dict[str, Any] = {"seconds": self.seconds}
        self.target_dir, self.drafter_dir = args.output / "target", args.output / "drafter"
        self.prompts_file = args.output / "prompts.jsonl"
        self.documents: list[Document] = []
        self.tokenizer: Tokenizer
        self.stream: np.ndarray  # [N] token ids

    def stage(self, name: str) -> StageTimer:
        return StageTimer(name, self.seconds)

    def prepare(self) -> None:
        """Documents, tokenizer, token stream, held-out prompts."""
        self.documents = machine_documents(1e6 * self.args.corpus_megabytes, self.rng)
        documents = training_documents(self.documents)
        print(f"{len(documents)} files, {sum(len(d.text) for d in documents) / 1e6:.1f}M characters", flush=True)
        texts = (document.text for document in first(documents, TOKENIZER_CHARACTERS))
        self.tokenizer = train_tokenizer(texts, self.args.vocab_size)
        save_tokenizer(self.tokenizer, self.target_dir, MAX_LENGTH)
        self.stream = self._token_stream(documents)
        print(f"{len(self.stream) / 1e6:.1f}M tokens", flush=True)
        prompts = held_out_prompts(held_out_documents(self.documents), self.tokenizer, self.args.held_out, seed=0)
        write_prompts(prompts, self.args.output / "heldout.jsonl")
        self.held_out = prompts

    def _token_stream(self, documents: list[Document]) -> np.ndarray:
        with_chat = first(documents, CHAT_CHARACTERS)
        parts = [token_stream(with_chat, self.tokenizer, 0.5, self.rng)]
        rest = [document.text + END_OF_TEXT for document in documents[len(with_chat) :]]
        for start in range(0, len(rest), 500):
            encoded = self.tokenizer.encode_batch_fast(rest[start : start + 500])
            parts += [np.asarray(item.ids, dtype=np.uint16) for item in encoded]
        return np.concatenate(parts)

    def train_target(self) -> None:
        """Saved in bf16."""
        args, clock = self.args, Clock(self.args.target_seconds)
        model = Qwen3ForCausalLM(self._target_config()).to(self.device).train()
        self.facts["target_parameters"] = sum(p.numel() for p in model.parameters())
        print(f"target of {self.facts['target_parameters'] / 1e6:.1f}M parameters", flush=True)
        optimizer = self._optimizer(model, args.target_lr, weight_decay=0.1, betas=(0.9, 0.95))
        self._compile(model.model.layers)
        window = min(MAX_LENGTH, args.batch_tokens // 4)
        data = windows(self.stream, window, args.batch_tokens // window, self.rng)
        for step in clock.steps():
            loss = next_token_loss(model, next(data).to(self.device, non_blocking=True))
            self._update(model, optimizer, loss, args.target_lr * clock.factor())
            if clock.wants_report():
                self.facts |= {"target_loss": round(loss.item(), 3), "target_tokens": step * args.batch_tokens}
                speed = step * args.batch_tokens / clock.elapsed
                print(f"{clock.elapsed:6.1f} s, step {step}, loss {loss.item():.3f}, {speed:.0f} tokens/s", flush=True)
        save_target(model, end_token_ids(self.tokenizer), self.target_dir)

    def _target_config(self) -> Qwen3Config:
        args, heads = self.args, self.args.hidden_size // HEAD_DIM
        config = target_config(args.vocab_size, special_id(self.tokenizer, IM_END)).to_dict()
        shape = {
            "hidden_size": args.hidden_size,
            "intermediate_size": intermediate_size(args.hidden_size),
            "num_hidden_layers": args.num_layers,
            "layer_types": ["full_attention"] * args.num_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": next(n for n in (4, 2, 1) if heads % n == 0),
            "max_position_embeddings": MAX_LENGTH,
        }
        return Qwen3Config.from_dict(config | shape)

    def write_prompts(self) -> None:
        """What `vllm-dflash train` is to have answered, from files that are not held out."""
        documents = first(training_documents(self.documents), PROMPT_CHARACTERS)
        found = training_prompts(documents, self.tokenizer, LONGEST_PROMPT, self.rng)
        wanted = self.rng.sample(found, min(len(found), self.args.prompts))
        write_user_prompts(wanted, self.prompts_file)
        self.facts["prompts"] = len(wanted)

    def train_drafter(self) -> None:
        """By the command, as a user does it."""
        train_drafter(self.target_dir, self.prompts_file, self.drafter_dir, self._drafter_recipe())

    def _drafter_recipe(self) -> dict[str, dict[str, Any]]:
        args, last = self.args, self.args.num_layers - 1
        taps = {min(last, max(0, round(1 + i * (args.num_layers - 4) / 4))) for i in range(5)}
        return {
            "data": {
                "held_out": 16,
                "max_new_tokens": args.response_tokens,
                "max_length": MAX_LENGTH,
                "gpu_memory_utilization": 0.5,  # a small target needs no more
                "feature_cache_gb": args.feature_cache_gb,
            },
            "model": {
                "num_layers": args.drafter_layers,
                "block_size": args.block_size,
                "target_layer_ids": sorted(taps),
            },
            "training": {
                "steps": args.drafter_steps,
                "batch_tokens": args.batch_tokens,
                "tokens_per_anchor": 8,
                "learning_rate": args.drafter_lr,
                "checkpoint_every": args.drafter_steps,
                "evaluate_tokens": 64,
            },
        }

    def measure(self) -> None:
        """Acceptance on prompts of files that neither model has seen, by the Transformers implementation."""
        target = Qwen3ForCausalLM.from_pretrained(self.target_dir, dtype=torch.bfloat16).to(self.device).eval()
        draft = DFlashDraftModel.from_pretrained(str(self.drafter_dir), dtype=torch.bfloat16).to(self.device).eval()
        self.facts["drafter_parameters"] = sum(p.numel() for p in draft.parameters())
        step = max(1, len(self.held_out) // self.args.evaluate)
        with torch.device(self.device):
            result = acceptance(draft, target, self.held_out[::step], MEASURED_TOKENS, end_token_ids(self.tokenizer))
        self.facts["acceptance_length"] = round(result.length, 3)
        shares = ", ".join(f"{share:.2f}" for share in result.per_position)
        print(f"acceptance length {result.length:.3f} ({result.drafts} drafts); per position {shares}", flush=True)

    def _optimizer(
        self, model: nn.Module, rate: float, weight_decay: float, betas: tuple[float, float]
    ) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=rate, betas=betas, weight_decay=weight_decay, fused=True)

    def _update(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor, rate: float) -> None:
        optimizer.param_groups[0]["lr"] = rate
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def _compile(self, layers: nn.ModuleList) -> None:
        """Layer by layer: all of them share one compiled graph."""
        for layer in layers if self.args.compile else ():
            layer.compile()


def intermediate_size(hidden_size: int) -> int:
    return round(hidden_size * 11 / 3 / 64) * 64


def machine_documents(max_characters: float, rng: random.Random) -> list[Document]:
    """Python sources of the standard library and of installed packages, no package more than an eighth of all."""
    packages = [p.parent for p in Path(sysconfig.get_path("purelib")).glob("*/__init__.py")]
    rng.shuffle(packages)
    documents: list[Document] = []
    left = max_characters
    for root in (default_root(), *sorted(packages, key=lambda p: p.name not in ("torch", "transformers", "numpy"))):
        try:
            found = load_documents(root, max_characters=left if root == default_root() else max_characters / 8)
        except (ValueError, OSError):  # nothing usable there
            continue
        paths = [f"{root.name}/{document.path}" for document in found]
        documents += [Document(path, d.text, is_held_out(path)) for path, d in zip(paths, found, strict=True)]
        left = max_characters - sum(len(document.text) for document in documents)
        if left <= 0:
            break
    rng.shuffle(documents)
    return documents


def first(documents: list[Document], max_characters: int) -> list[Document]:
    """The first documents, up to so many characters."""
    sizes = itertools.accumulate(len(document.text) for document in documents)
    return [document for document, size in zip(documents, sizes, strict=True) if size <= max_characters]


if __name__ == "__main__":
    main()
