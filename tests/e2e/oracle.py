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


def assert_same_but_near_ties(
    got: list[list[int]], expected: list[list[int]], prompts: list[list[int]], most: int, margin: float = 0.15
) -> None:
    """Texts of bf16 engines: where two first differ, rounding decided between logits that are almost the same.

    At most `most` texts differ, and in fp32 each of their tokens is less than `margin` behind the likeliest one.
    """
    import torch
    from transformers import AutoModelForCausalLM

    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    differing = [index for index, (ours, theirs) in enumerate(zip(got, expected, strict=True)) if ours != theirs]
    assert len(differing) <= most, f"prompts {differing}"
    for index in differing:
        pairs = zip(got[index], expected[index], strict=True)
        place = next(place for place, (ours, theirs) in enumerate(pairs) if ours != theirs)
        text = torch.tensor([prompts[index] + expected[index][:place]])
        with torch.inference_mode():
            logits = target(text).logits[0, -1]
        behind = (logits.max() - logits[[got[index][place], expected[index][place]]]).tolist()
        assert max(behind) < margin, f"prompt {index}, token {place}: {behind} behind the likeliest"


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
