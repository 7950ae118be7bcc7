# SPDX-License-Identifier: Apache-2.0
"""Acceptance of a drafter on prompts that neither model has seen, at temperature 0.

python -m vllm_dflash.training.evaluate --target DIR --drafter DIR --prompts heldout.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from vllm_dflash.benchmark.metrics import counts_of_rounds
from vllm_dflash.hf import DFlashDraftModel
from vllm_dflash.hf.sequences import id_list
from vllm_dflash.training.prompts import Prompt, read_prompts


@dataclass(frozen=True)
class Acceptance:
    """Pooled over all drafts of all prompts. accepted[k-1]: in how many drafts the first k tokens were kept."""

    drafts: int
    accepted: tuple[int, ...]

    @property
    def length(self) -> float:
        """Acceptance length: tokens a round adds on average, the target's own token included."""
        return 1 + sum(self.accepted) / self.drafts

    @property
    def per_position(self) -> tuple[float, ...]:
        """Share of drafts whose first k tokens were all kept, k = 1..K."""
        return tuple(count / self.drafts for count in self.accepted)


def acceptance(
    draft: DFlashDraftModel,
    target: torch.nn.Module,
    prompts: Iterable[Prompt],
    max_new_tokens: int,
    end_ids: list[int] | None,
) -> Acceptance:
    """Generate with drafting and count. `end_ids` end a response early; None always writes `max_new_tokens`."""
    lengths: list[int] = []
    for prompt in prompts:
        lengths += acceptance_lengths(draft, target, prompt.prompt_token_ids, max_new_tokens, end_ids)
    if not lengths:
        raise ValueError("nothing was drafted: no prompts, or --max-new-tokens is 1")
    counts = counts_of_rounds(lengths, draft.block_size - 1)
    return Acceptance(counts.drafts, counts.accepted_per_position)


def acceptance_lengths(
    draft: DFlashDraftModel,
    target: torch.nn.Module,
    token_ids: Sequence[int],
    max_new_tokens: int,
    end_ids: list[int] | None,
) -> list[int]:
    """Of each draft of one prompt's greedy response: tokens accepted and the target's own."""
    output = draft.spec_generate(
        input_ids=torch.tensor([token_ids], device=draft.device),
        target=target,
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        stop_token_ids=end_ids,
        return_stats=True,
    )
    return output.acceptance_lengths


def acceptance_records(
    draft: DFlashDraftModel,
    target: torch.nn.Module,
    prompts: list[Prompt],
    max_new_tokens: int,
    end_ids: list[int] | None,
) -> list[dict[str, Any]]:
    """One JSON-ready record over all prompts, then one for each kind of prompt."""
    records = []
    for name in ("all", *sorted({prompt.kind for prompt in prompts})):
        group = [prompt for prompt in prompts if name in ("all", prompt.kind)]
        result = acceptance(draft, target, group, max_new_tokens, end_ids)
        record: dict[str, Any] = {"prompts": name, "count": len(group), "max_new_tokens": max_new_tokens}
        record |= {"acceptance_length": round(result.length, 3), "drafts": result.drafts}
        records.append(record | {"per_position": [round(share, 3) for share in result.per_position]})
    return records


def main(argv: list[str] | None = None) -> None:
    """Print one JSON line over all prompts, and one for each kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, required=True, help="directory of the target")
    parser.add_argument("--drafter", type=Path, required=True, help="directory of the drafter")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL of prompts with prompt_token_ids")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--ignore-eos", action="store_true", help="write on after an end token")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args(argv)
    for flag, path in (("--target", arguments.target), ("--drafter", arguments.drafter)):
        if not (path / "config.json").is_file():
            parser.error(f"{flag} {path}: no config.json there")
    if not arguments.prompts.is_file():
        parser.error(f"--prompts {arguments.prompts}: no such file")
    if arguments.max_new_tokens < 2:
        parser.error(f"--max-new-tokens {arguments.max_new_tokens}: nothing is drafted below 2")
    dtype = getattr(torch, arguments.dtype)
    target = AutoModelForCausalLM.from_pretrained(arguments.target, dtype=dtype).eval()
    draft = DFlashDraftModel.from_pretrained(str(arguments.drafter), dtype=dtype).eval()
    end_ids = None if arguments.ignore_eos else id_list(target.generation_config.eos_token_id)
    prompts = read_prompts(arguments.prompts)
    for record in acceptance_records(draft, target, prompts, arguments.max_new_tokens, end_ids):
        print(json.dumps(record))


if __name__ == "__main__":
    main()
