# SPDX-License-Identifier: Apache-2.0
"""How fast a training by `vllm-dflash train` ran, from what it left in its output folder.

    python benchmarks/train_throughput.py --drafter DIR [--skip 2]

Tokens are those of prompts and responses, without padding. The share of the card's bf16 speed is that of the
multiplications that the training needs: the target's forward (none where features came from a cache), the drafter's
forward and backward, the frozen LM head's for the drafted rows; what is computed twice to save memory counts once. The
card's own speed is measured beside it, by multiplying large matrices. Reports of the first --skip x 10 seconds,
in which kernels are compiled, are left out. For a training on one card. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu.machine import on_cuda, run_facts
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoConfig, PretrainedConfig

from vllm_dflash.config import DFlashConfig
from vllm_dflash.training.batch_plan import BatchPlan
from vllm_dflash.training.blocks import BlockShape
from vllm_dflash.training.recipe import Recipe
from vllm_dflash.training.response_store import RESPONSES_FILE

FORWARD_AND_BACKWARD = 3  # a weight's multiplications: forward, for its input's gradient, for its own
HEAD = 2  # a frozen one's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafter", type=Path, required=True, help="the output folder of a training")
    parser.add_argument("--skip", type=int, default=2, help="reports to leave out")
    args = parser.parse_args()
    run = Run(args.drafter)
    reports = run.reports()
    if len(reports) <= args.skip:
        parser.error(
            f"--skip {args.skip}: the run has {len(reports)} reports, one for each 10 seconds; train for longer"
        )
    tokens_s = statistics.median(reports[args.skip :])
    work = run.work()
    facts = {
        "tokens_s": round(tokens_s),
        "tokens_of_padded": round(work.tokens / work.padded_tokens, 3),
        "flop_of_a_token": round(work.flop / work.tokens),
        "tflop_s": round(tokens_s * work.flop / work.tokens / 1e12, 1),
    }
    if on_cuda():
        peak = measured_peak()
        facts |= {"card_tflop_s": round(peak / 1e12), "share": round(1e12 * facts["tflop_s"] / peak, 3)}
    print(json.dumps(run_facts() | facts))


@dataclass
class Work:
    """Of an epoch."""

    tokens: int = 0
    padded_tokens: int = 0
    flop: float = 0.0


class Run:
    """A training's output folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        origin = json.loads((folder / "work" / "run.json").read_text())
        self.recipe = Recipe.model_validate(origin["recipe"])
        self.draft = DFlashConfig.from_dict(json.loads((folder / "config.json").read_text()), source=str(folder))
        self.target = AutoConfig.from_pretrained(origin["target"]).get_text_config(decoder=True)
        self.reads_features = any((folder / "work").glob("features*"))

    def reports(self) -> list[float]:
        """Tokens a second of each report."""
        (logs,) = (self.folder / "logs").glob("*/events.*")
        events = EventAccumulator(str(logs))
        events.Reload()
        return [event.value for event in events.Scalars("tokens_per_second")]

    def work(self) -> Work:
        """Of one epoch, by the shapes of its batches."""
        lengths = []
        for line in (self.folder / "work" / RESPONSES_FILE).read_text().splitlines():
            record = json.loads(line)
            lengths.append(len(record["prompt_token_ids"]) + len(record["token_ids"]))
        training = self.recipe.training
        plan = BatchPlan(lengths, self.recipe.data.max_length, training.batch_tokens, training.seed)
        found = Work()
        for batch in map(plan.batch, range(plan.epoch_size)):
            rows, padded = len(batch.indices), batch.padded_length
            found.tokens += sum(min(lengths[index], padded) for index in batch.indices)
            found.padded_tokens += rows * padded
            found.flop += rows * self._sequence_flop(padded)
        return found

    def _sequence_flop(self, length: int) -> float:
        """Of a training step, for one sequence."""
        training, block = self.recipe.training, self.draft.block_size
        shape = BlockShape(block, self.draft.mask_token_id, training.anchors, training.tokens_per_anchor)
        num_blocks = shape.num_anchors(length)
        # Causal attention sees half of the sequence on average; so does a block, beside its own rows.
        target = 0.0 if self.reads_features else length * layers_flop(self.target, length / 2)
        draft = num_blocks * block * layers_flop(self.draft, length / 2 + block) + length * self._context_flop()
        head = 2.0 * num_blocks * (block - 1) * self.draft.hidden_size * self.draft.draft_vocab_size
        return target + FORWARD_AND_BACKWARD * draft + HEAD * head

    def _context_flop(self) -> float:
        """Of a token's features: fused, and K and V in every layer."""
        c = self.draft
        fused = len(c.target_layer_ids) * c.target_hidden_size * c.hidden_size
        return 2.0 * (fused + c.num_hidden_layers * 2 * c.hidden_size * c.num_key_value_heads * c.head_dim)


def layers_flop(c: PretrainedConfig | DFlashConfig, num_keys: float) -> float:
    """Of a row's way through all layers, attending to so many keys, without the LM head."""
    heads, kv_heads = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    weights = c.hidden_size * (2 * heads + 2 * kv_heads + 3 * c.intermediate_size)
    return c.num_hidden_layers * (2.0 * weights + 4.0 * heads * num_keys)


def measured_peak(size: int = 8192, times: int = 50) -> float:
    """Multiplications and additions a second of large bf16 matrices."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(10):
        left @ right
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(times):
        left @ right
    torch.cuda.synchronize()
    return 2.0 * size**3 * times / (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
