# SPDX-License-Identifier: Apache-2.0
"""The shipped drafter accepts as much in vLLM as in the Transformers oracle, round by round, and enough."""

from __future__ import annotations

import pytest

from tests.e2e.engines import DRAFTER, TARGET, dflash, held_out_prompts, run_engine
from tests.e2e.oracle import assert_same_rounds, oracle_outputs

pytestmark = pytest.mark.engine

NUM_PROMPTS, MAX_TOKENS = 32, 128
MAX_MODEL_LEN, K = 1024, 15


@pytest.fixture(scope="module")
def oracle():
    """Plain `spec_generate` on Transformers, fp32: for each prompt the ids and every round's acceptance length."""
    return oracle_outputs(DRAFTER, held_out_prompts(NUM_PROMPTS), MAX_TOKENS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Prompts one by one; and together, long ones that end at the limit of length."""
    run = {"name": "alone", "prompts": held_out_prompts(NUM_PROMPTS), "max_tokens": MAX_TOKENS, "concurrent": False}
    rooms = [MAX_MODEL_LEN - len(prompt) for prompt in long_prompts()]
    at_limit = {"name": "at the limit", "prompts": long_prompts(), "max_tokens": rooms}
    llm = {"model": str(TARGET), "dtype": "float32", "max_model_len": MAX_MODEL_LEN} | dflash()
    return run_engine(tmp_path_factory.mktemp("served"), llm, [run, at_limit])


@pytest.fixture(scope="module")
def served(runs):
    return runs["alone"]


def long_prompts():
    """Four prompts with room for 21 to 51 tokens."""
    text = [token for prompt in held_out_prompts(NUM_PROMPTS) for token in prompt] * 2
    return [text[start : start + MAX_MODEL_LEN - room] for start, room in ((0, 21), (100, 33), (200, 44), (300, 51))]


def test_same_rounds_as_the_oracle(served, oracle):
    assert_same_rounds(served, [output.acceptance_lengths for output in oracle])


def test_same_text_as_the_oracle(served, oracle):
    for prompt, ids, output in zip(held_out_prompts(NUM_PROMPTS), served.token_ids, oracle, strict=True):
        assert ids == output.sequences[0, len(prompt) :].tolist()


def test_mean_acceptance_length(served):
    """Recorded in models/tiny-python/drafter/README.md; K = 15, temperature 0, held-out prompts, pooled."""
    assert served.acceptance_length >= 5.2


def by_position(run, name):
    return [run.counters[f"{name}[{place}]"] for place in range(K)]


@pytest.mark.parametrize("name", ["alone", "at the limit"])
def test_our_counters_are_vllms(runs, name):
    """Where both count."""
    run = runs[name]
    counted = "spec_decode_num_accepted_tokens_per_pos"
    assert run.counters["vllm_dflash:spec_decode_num_drafts"] == run.counters["vllm:spec_decode_num_drafts"] > 0
    assert by_position(run, f"vllm_dflash:{counted}") == by_position(run, f"vllm:{counted}")
    drafted = by_position(run, "vllm_dflash:spec_decode_num_draft_tokens_per_pos")
    assert sum(drafted) == run.counters["vllm:spec_decode_num_draft_tokens"]


def test_drafts_by_position_near_the_limit(runs):
    """Counted from what each step of each request yielded: a draft has room for all its tokens and one more."""
    run, lengths = runs["at the limit"], []
    for prompt, steps in zip(long_prompts(), run.step_lengths, strict=True):
        length = len(prompt) + steps[0]
        for gained in steps[1:]:
            lengths.append(min(K, MAX_MODEL_LEN - length - 1))
            length += gained
        assert length == MAX_MODEL_LEN
    expected = [sum(drafted > place for drafted in lengths) for place in range(K)]
    assert len(set(expected)) > 3, "drafts of the same length throughout"
    assert by_position(run, "vllm_dflash:spec_decode_num_draft_tokens_per_pos") == expected
    assert run.counters["vllm_dflash:spec_decode_num_drafts"] == expected[0]


def test_steps_are_timed(runs):
    """On a CPU each step that drafts and verifies; offline as in a server."""
    run = runs["alone"]
    steps = run.counters["vllm_dflash:draft_time_seconds_count"]
    assert 0.9 * run.counters["vllm:spec_decode_num_drafts"] < steps <= run.counters["vllm:spec_decode_num_drafts"]
    for part in ("verify", "draft"):
        assert 1e-4 < run.counters[f"vllm_dflash:{part}_time_seconds_sum"] / steps < 1
    assert not any(count for name, count in run.counters.items() if "fallbacks" in name)
