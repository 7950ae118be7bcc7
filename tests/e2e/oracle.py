# SPDX-License-Identifier: Apache-2.0
"""`spec_generate` on Transformers, fp32, one prompt at a time: what an engine's rounds are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.e2e.engines import TARGET, Run


def oracle_outputs(
    drafter: Path, prompts: list[list[int]], max_tokens: int, tree_budget: int | None = None
) -> list[Any]:
    """A SpecGenerateOutput of each prompt; chains without a `tree_budget`."""
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_dflash.hf import DFlashDraftModel

    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    draft = DFlashDraftModel.from_pretrained(str(drafter), dtype=torch.float32).eval()
    options = {"target": target, "max_new_tokens": max_tokens, "return_stats": True, "tree_budget": tree_budget}
    return [draft.spec_generate(input_ids=torch.tensor([prompt]), **options) for prompt in prompts]


def oracle_rounds(
    drafter: Path, prompts: list[list[int]], max_tokens: int, tree_budget: int | None = None
) -> list[list[int]]:
    """Every round's acceptance length."""
    return [output.acceptance_lengths for output in oracle_outputs(drafter, prompts, max_tokens, tree_budget)]


def assert_same_rounds(run: Run, rounds: list[list[int]]) -> None:
    """That an engine accepted in every round what the oracle did."""
    for index, (steps, expected) in enumerate(zip(run.step_lengths, rounds, strict=True)):
        # vLLM's first step is the prefill's own token; its last round is cut at max_tokens.
        assert steps[1:-1] == expected[:-1], f"prompt {index}"
