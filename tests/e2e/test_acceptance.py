# SPDX-License-Identifier: Apache-2.0
"""The shipped drafter accepts as much in vLLM as in the Transformers oracle, round by round, and enough."""

from __future__ import annotations

import pytest
import torch

from tests.e2e.engines import DRAFTER, TARGET, dflash, held_out_prompts, run_engine

pytestmark = pytest.mark.engine

NUM_PROMPTS, MAX_TOKENS = 32, 128


@pytest.fixture(scope="module")
def oracle():
    """Plain `spec_generate` on Transformers, fp32: for each prompt the ids and every round's acceptance length."""
    from transformers import AutoModelForCausalLM

    from vllm_dflash.hf import DFlashDraftModel

    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    draft = DFlashDraftModel.from_pretrained(str(DRAFTER), dtype=torch.float32).eval()
    outputs = []
    for prompt in held_out_prompts(NUM_PROMPTS):
        outputs.append(
            draft.spec_generate(
                input_ids=torch.tensor([prompt]), target=target, max_new_tokens=MAX_TOKENS, return_stats=True
            )
        )
    return outputs


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    run = {"name": "alone", "prompts": held_out_prompts(NUM_PROMPTS), "max_tokens": MAX_TOKENS, "concurrent": False}
    llm = {"model": str(TARGET), "dtype": "float32", "max_model_len": 1024} | dflash()
    return run_engine(tmp_path_factory.mktemp("served"), llm, [run])["alone"]


def test_same_rounds_as_the_oracle(served, oracle):
    for index, (steps, output) in enumerate(zip(served.step_lengths, oracle, strict=True)):
        # vLLM's first step is the prefill's own token; its last round is cut at max_tokens.
        assert steps[1:-1] == output.acceptance_lengths[:-1], f"prompt {index}"


def test_same_text_as_the_oracle(served, oracle):
    for prompt, ids, output in zip(held_out_prompts(NUM_PROMPTS), served.token_ids, oracle, strict=True):
        assert ids == output.sequences[0, len(prompt) :].tolist()


def test_mean_acceptance_length(served):
    """Recorded in models/tiny-python/drafter/README.md; K = 15, temperature 0, held-out prompts, pooled."""
    assert served.acceptance_length >= 3.6
