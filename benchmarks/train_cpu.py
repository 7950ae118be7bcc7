# SPDX-License-Identifier: Apache-2.0
"""What `vllm-dflash train` reaches on a CPU in a few minutes, for the shipped target of 3.6M parameters.

    python benchmarks/train_cpu.py --output DIR

Prompts are cut from Python's standard library, from files that the target has been trained on; held-out ones are the
shipped pair's, of files that it has not seen. The settings stand in RECIPE. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from gpu.machine import run_facts
from gpu.train_command import train_drafter
from transformers import AutoModelForCausalLM

from vllm_dflash.console import SHIPPED_PAIR
from vllm_dflash.hf import DFlashDraftModel
from vllm_dflash.training.corpus import default_root, load_documents, training_documents
from vllm_dflash.training.evaluate import acceptance
from vllm_dflash.training.prompts import read_prompts, training_prompts, write_user_prompts
from vllm_dflash.training.tokenizer import load_tokenizer

RECIPE = {
    "data": {"held_out": 8, "max_new_tokens": 128, "max_length": 320, "sampled_share": 0.0, "feature_cache_gb": 2},
    "model": {"num_layers": 2, "block_size": 8, "target_layer_ids": [1, 3, 5, 6], "intermediate_size": 384},
    "training": {
        "batch_tokens": 1024,
        "tokens_per_anchor": 8,
        "learning_rate": 3.0e-3,
        "precision": "fp32",
        "evaluate_tokens": 64,
    },
}
LONGEST_PROMPT = 160  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--measured-prompts", type=int, default=24)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    prompts, drafter = args.output / "prompts.jsonl", args.output / "drafter"
    write_prompts(prompts, args.prompts)
    begun = time.monotonic()
    training = RECIPE["training"] | {"steps": args.steps}
    train_drafter(SHIPPED_PAIR / "target", prompts, drafter, RECIPE | {"training": training})
    seconds = round(time.monotonic() - begun, 1)
    found = measured(drafter, args.measured_prompts)
    facts = run_facts() | {"seconds": seconds, "prompts": args.prompts, "steps": args.steps}
    print(json.dumps(facts | {"acceptance_length": round(found, 3)}))


def write_prompts(file: Path, count: int) -> None:
    """As a user would have them: text, and what a user says."""
    tokenizer, documents = load_tokenizer(SHIPPED_PAIR / "target"), training_documents(load_documents(default_root()))
    found = training_prompts(documents, tokenizer, LONGEST_PROMPT, random.Random(0))
    write_user_prompts(random.Random(1).sample(found, count), file)


def measured(drafter: Path, count: int) -> float:
    """Acceptance length at temperature 0 on the shipped held-out prompts, 128 tokens each."""
    target = AutoModelForCausalLM.from_pretrained(SHIPPED_PAIR / "target", dtype=torch.float32).eval()
    draft = DFlashDraftModel.from_pretrained(str(drafter), dtype=torch.float32).eval()
    prompts = read_prompts(SHIPPED_PAIR / "heldout.jsonl")
    ends = target.generation_config.eos_token_id
    return acceptance(draft, target, prompts[:: max(1, len(prompts) // count)][:count], 128, ends).length


if __name__ == "__main__":
    main()
