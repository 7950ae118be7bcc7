# SPDX-License-Identifier: Apache-2.0
"""What FP8 weights and a reduced draft vocabulary cost in acceptance.

    python benchmarks/cheaper_drafts.py [--pair models/tiny-python] [--num-prompts 32] [--max-tokens 128]
                                        [--vocab-sizes 1024,512] [--vocab-file FILE]

One engine after another on the same held-out prompts, one request at a time, temperature 0. The token ids must be those
of the engine without options: the script ends with exit status 1 if they are not. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from arguments import numbers

from vllm_dflash.benchmark.engine_process import run_engine
from vllm_dflash.benchmark.job import EngineJob, EngineResult
from vllm_dflash.benchmark.prompts import load_prompts
from vllm_dflash.console import SHIPPED_PAIR


def main() -> int:
    args = parse_arguments()
    results = {name: run(args, options) for name, options in variants(args)}
    reference = token_ids(results["none"])
    rows = []
    for name, result in results.items():
        assert result.acceptance is not None
        rows.append({
            "options": name,
            "acceptance_length": round(result.acceptance.acceptance_length, 3),
            "to_none": round(result.acceptance.acceptance_length / results["none"].acceptance.acceptance_length, 3),
            "same_token_ids": token_ids(result) == reference,
        })  # fmt: skip
    print("| options | acceptance length | to none | same token ids |\n|--|--:|--:|--|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    print(json.dumps(rows))
    return 0 if all(row["same_token_ids"] for row in rows) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, default=SHIPPED_PAIR, help="folder with target/, drafter/, heldout.jsonl")
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--vocab-sizes", type=numbers, default=[1024, 512])
    parser.add_argument("--vocab-file", type=Path, help="frequency list or corpus; default: the lowest ids")
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


def variants(args: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """The option sets to compare, by name."""
    file = {"draft_vocab_file": str(args.vocab_file)} if args.vocab_file else {}
    fp8 = {"draft_weights": "fp8"}
    sizes = [(f"draft_vocab_size {size}", {"draft_vocab_size": size} | file) for size in args.vocab_sizes]
    both = [(f"draft_weights fp8, {name}", fp8 | options) for name, options in sizes[:1]]
    return [("none", {}), ("draft_weights fp8", fp8), *sizes, *both]


def run(args: argparse.Namespace, options: dict[str, Any]) -> EngineResult:
    prompts = load_prompts(args.pair / "heldout.jsonl", args.num_prompts, with_token_ids=True)
    job = EngineJob(
        target=str(args.pair / "target"),
        drafter=str(args.pair / "drafter"),
        num_speculative_tokens=json.loads((args.pair / "drafter" / "config.json").read_text())["block_size"] - 1,
        prompts=tuple(prompts),
        dtype=args.dtype,
        max_tokens=args.max_tokens,
        additional_config={"dflash": options} if options else None,
    )
    with tempfile.TemporaryDirectory() as folder:
        return run_engine(job, Path(folder) / "engine.log", lambda message: None)


def token_ids(result: EngineResult) -> list[tuple[int, ...]]:
    return [response.token_ids for response in result.responses]


if __name__ == "__main__":
    sys.exit(main())
