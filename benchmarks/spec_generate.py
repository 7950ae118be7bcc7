# SPDX-License-Identifier: Apache-2.0
"""Draft trees on Transformers: acceptance length and tokens/s over node budgets, one sequence at a time.

    python benchmarks/spec_generate.py                       # the shipped pair, on this machine's CPU
    python benchmarks/spec_generate.py --temperature 1
    python benchmarks/spec_generate.py --pair DIR --device cuda --dtype bfloat16 --compile

Plain decoding by `generate`, the chain (budget 0), each tree and "auto" take turns prompt by prompt, so that a machine
that drifts slows all of them alike. Greedy texts are compared token by token. At a temperature the chain's tokens are
samples of the drafter's distributions, or its likeliest ones ("greedy chain"). --other-calibration adds trees that do
not calibrate the drafter's probabilities where calls do, which is at a temperature; and where they do not, trees that
learn from prompt to prompt. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from arguments import numbers
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from vllm_dflash.benchmark.prompts import load_prompts
from vllm_dflash.console import SHIPPED_PAIR
from vllm_dflash.hf import DFlashDraftModel
from vllm_dflash.hf.calibration import Calibration

PLAIN, CHAIN, EAGER_CHAIN = "no speculation", "chain", "chain without graphs"

Answer = tuple[torch.Tensor, list[int]]  # sequences [1, P+n], acceptance lengths


def main() -> None:
    args = parse_arguments()
    disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    methods = make_methods(args)
    prompts = [list(prompt.token_ids or ()) for prompt in load_prompts(args.pair / "heldout.jsonl", args.num_prompts)]
    ids = [torch.tensor([prompt], device=args.device) for prompt in prompts]
    for generate in methods.values():
        torch.manual_seed(0)
        generate(max(ids, key=lambda prompt: prompt.shape[1]))  # warm-up, with the caches that all others fit
    rounds = [measure(methods, ids, args.device) for _ in range(args.rounds)]
    report(args, list(methods), rounds)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, default=SHIPPED_PAIR, help="folder with target/, drafter/, heldout.jsonl")
    parser.add_argument("--budgets", type=numbers, default=[7, 15, 31, 63, 127])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--other-calibration", type=numbers, default=[15, 31])
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="rounds as CUDA graphs; the chain also without")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU; 0: its own choice")
    args = parser.parse_args()
    if not (args.pair / "target" / "config.json").is_file():
        parser.error(f"--pair {args.pair}: no target/config.json there")
    return args


def make_methods(args: argparse.Namespace) -> dict[str, Callable[[torch.Tensor], Answer]]:
    """By name, what turns a prompt [1, P] into a sequence."""
    options: dict[str, Any] = {"dtype": getattr(torch, args.dtype)}
    target = AutoModelForCausalLM.from_pretrained(args.pair / "target", **options).to(args.device).eval()
    draft = DFlashDraftModel.from_pretrained(str(args.pair / "drafter"), **options).to(args.device).eval()
    tokens = args.max_new_tokens

    def plain(ids: torch.Tensor) -> Answer:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0} if args.temperature else {}
        text = target.generate(ids, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0, **sampling)
        return text, []

    def speculate(budget: int | str | None, other: bool = False, **options: Any) -> Callable[[torch.Tensor], Answer]:
        mine = copy.copy(draft)  # the same weights; each keeps graphs and times of its own
        options = {"compile": args.compile, "temperature": args.temperature} | options

        if other:
            options["calibration"] = other_calibration(args, draft.block_size - 1)

        def generate(ids: torch.Tensor) -> Answer:
            output = mine.spec_generate(ids, target, tokens, return_stats=True, tree_budget=budget, **options)
            if other:
                options["calibration"] = output.calibration
            return output.sequences, output.acceptance_lengths

        return generate

    eager = {EAGER_CHAIN: speculate(None, compile=False)} if args.compile else {}
    if args.temperature:
        eager["greedy chain"] = speculate(None, draft_sample_method="greedy")
    trees = {f"tree of {budget}": speculate(budget) for budget in args.budgets}
    for budget in args.other_calibration:
        trees[f"tree of {budget}, {'un' if args.temperature else ''}calibrated"] = speculate(budget, other=True)
    trees["auto"] = speculate("auto")
    return {PLAIN: plain, CHAIN: speculate(None)} | eager | trees


def other_calibration(args: argparse.Namespace, num_depths: int) -> Calibration:
    """At a temperature one that never learns, at none one that has all to learn."""
    known = math.inf if args.temperature else 0.0
    return Calibration(*(torch.full((num_depths,), value, device=args.device) for value in (1.0, known)))


def measure(
    methods: dict[str, Callable[[torch.Tensor], Answer]], prompts: list[torch.Tensor], device: str
) -> dict[str, dict[str, float]]:
    """One turn of every method on every prompt."""
    found = {name: {"seconds": 0.0, "tokens": 0, "rounds": 0, "accepted": 0, "same": 0} for name in methods}
    for ids in prompts:
        texts: dict[str, torch.Tensor] = {}
        for name, generate in methods.items():
            begun = time.perf_counter()
            text, lengths = generate(ids)
            if device != "cpu":
                torch.cuda.synchronize()
            own = found[name]
            own["seconds"] += time.perf_counter() - begun
            own["tokens"] += text.shape[1] - ids.shape[1]
            own["rounds"] += len(lengths)
            own["accepted"] += sum(lengths)
            texts[name] = text
        for name, text in texts.items():
            found[name]["same"] += torch.equal(text, texts[PLAIN])
    return found


def report(args: argparse.Namespace, names: list[str], rounds: list[dict[str, dict[str, float]]]) -> None:
    """A table, medians over the rounds, and the same as JSON."""
    rows = []
    for name in names:
        speeds = [one[name]["tokens"] / one[name]["seconds"] for one in rounds]
        to_chain = [one[CHAIN]["seconds"] / one[name]["seconds"] for one in rounds]
        of_all = {key: sum(one[name][key] for one in rounds) for key in ("accepted", "rounds", "same")}
        rows.append({
            "method": name,
            "acceptance_length": round(of_all["accepted"] / of_all["rounds"], 3) if of_all["rounds"] else None,
            "tokens_s": round(statistics.median(speeds), 1),
            "to_chain": round(statistics.median(to_chain), 3),
            "same_text": None if args.temperature else f"{of_all['same']} of {args.num_prompts * len(rounds)}",
        })  # fmt: skip
    print(f"{args.pair}, {args.dtype} on {args.device}, temperature {args.temperature:g}, {args.num_prompts} prompts x "
          f"{args.max_new_tokens} tokens, {args.rounds} rounds; torch {torch.__version__}, "
          f"transformers {transformers.__version__}\n")  # fmt: skip
    print("| method | acceptance length | tokens/s | to the chain | same text |\n|--|--:|--:|--:|--:|")
    for row in rows:
        print("| " + " | ".join("" if value is None else str(value) for value in row.values()) + " |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
