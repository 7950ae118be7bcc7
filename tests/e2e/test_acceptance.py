# SPDX-License-Identifier: Apache-2.0
"""The shipped drafter accepts as much in vLLM as in the Transformers oracle, round by round, and enough."""

from __future__ import annotations

import pytest

from tests.e2e.engines import DRAFTER, TARGET, dflash, held_out_prompts, run_engine
from tests.e2e.oracle import assert_same_rounds, oracle_outputs

pytestmark = pytest.mark.engine

NUM_PROMPTS, MAX_TOKENS = 32, 128


@pytest.fixture(scope="module")
def oracle():
    """Plain `spec_generate` on Transformers, fp32: for each prompt the ids and every round's acceptance length."""
    return oracle_outputs(DRAFTER, held_out_prompts(NUM_PROMPTS), MAX_TOKENS)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    run = {"name": "alone", "prompts": held_out_prompts(NUM_PROMPTS), "max_tokens": MAX_TOKENS, "concurrent": False}
    llm = {"model": str(TARGET), "dtype": "float32", "max_model_len": 1024} | dflash()
    return run_engine(tmp_path_factory.mktemp("served"), llm, [run])["alone"]


def test_same_rounds_as_the_oracle(served, oracle):
    assert_same_rounds(served, [output.acceptance_lengths for output in oracle])


def test_same_text_as_the_oracle(served, oracle):
    for prompt, ids, output in zip(held_out_prompts(NUM_PROMPTS), served.token_ids, oracle, strict=True):
        assert ids == output.sequences[0, len(prompt) :].tolist()


def test_mean_acceptance_length(served):
    """Recorded in models/tiny-python/drafter/README.md; K = 15, temperature 0, held-out prompts, pooled."""
    assert served.acceptance_length >= 3.6
