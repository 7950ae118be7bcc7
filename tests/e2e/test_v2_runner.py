# SPDX-License-Identifier: Apache-2.0
"""vLLM's V2 model runner with this package's speculator: same token ids, same rounds as the oracle.

Without a GPU all of it, vLLM's kernels and this package's, runs in Triton's interpreter: about 0.2 s a step, so batches
are small and texts short.
"""

from __future__ import annotations

import json
import shutil

import pytest

from tests.e2e.engines import DRAFTER, TARGET, dflash, held_out_prompts, run_engine
from tests.e2e.oracle import assert_same_rounds, oracle_rounds

pytestmark = pytest.mark.engine

NUM_PROMPTS, MAX_TOKENS = 8, 64
BASE = {"model": str(TARGET), "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 8}
RUN = {"max_tokens": MAX_TOKENS}


@pytest.fixture(scope="module")
def prompts():
    return held_out_prompts(NUM_PROMPTS)


@pytest.fixture(scope="module")
def plain(prompts, tmp_path_factory):
    """vLLM without speculation, on the V1 runner: one request after the other."""
    run = RUN | {"name": "alone", "prompts": prompts, "concurrent": False}
    return run_engine(tmp_path_factory.mktemp("plain"), BASE, [run])["alone"].token_ids


@pytest.fixture(scope="module")
def v1(prompts, tmp_path_factory):
    """This package on the V1 runner."""
    run = RUN | {"name": "v1", "prompts": prompts}
    return run_engine(tmp_path_factory.mktemp("v1"), BASE | dflash(), [run])["v1"]


@pytest.fixture(scope="module")
def v2(prompts, tmp_path_factory):
    """This package on the V2 runner: a batch, then the same prompts from the prefix cache."""
    runs = [RUN | {"name": name, "prompts": prompts} for name in ("batched", "cached")]
    llm = BASE | dflash() | {"enable_prefix_caching": True, "block_size": 32}
    return run_engine(tmp_path_factory.mktemp("v2"), llm, runs, runner="V2")


@pytest.fixture(scope="module")
def oracle(prompts):
    return oracle_rounds(DRAFTER, prompts, MAX_TOKENS)


def drafted(run) -> bool:
    """Guards against a vacuous pass: many tokens must have come from accepted drafts."""
    return run.counters["vllm:spec_decode_num_accepted_tokens"] > NUM_PROMPTS * MAX_TOKENS / 3


def test_same_tokens_as_without_speculation(v2, plain):
    assert drafted(v2["batched"])
    assert v2["batched"].token_ids == plain


def test_same_tokens_as_on_v1(v2, v1):
    assert v2["batched"].token_ids == v1.token_ids


def test_same_rounds_as_the_oracle(v2, oracle):
    assert_same_rounds(v2["batched"], oracle)


def test_prefix_cache_hit(v2, plain):
    """Cached prompts bring the draft layers' K/V along."""
    assert v2["cached"].counters["vllm:prefix_cache_hits"] > 0
    assert v2["cached"].token_ids == plain
    assert v2["cached"].acceptance_length == pytest.approx(v2["batched"].acceptance_length, rel=0.02)


def test_chunked_prefill(prompts, plain, oracle, tmp_path):
    """Prompts in pieces, mixed with a decoding request of 16 rows; the rounds stay the oracle's."""
    run = RUN | {"name": "chunked", "prompts": prompts[:4]}
    llm = BASE | dflash() | {"max_num_batched_tokens": 40, "max_num_seqs": 2, "enable_prefix_caching": False}
    chunked = run_engine(tmp_path, llm, [run], runner="V2")["chunked"]
    assert chunked.token_ids == plain[:4]
    assert chunked.acceptance_length > 1.5
    assert_same_rounds(chunked, oracle[:4])


def test_preemption(prompts, plain, tmp_path):
    """A cache far too small for the batch: requests lose their blocks midway and start over."""
    run = RUN | {"name": "preempted", "prompts": prompts}
    llm = BASE | dflash() | {"num_gpu_blocks_override": 14, "block_size": 32, "max_model_len": 384}
    preempted = run_engine(tmp_path, llm, [run], runner="V2")["preempted"]
    assert preempted.counters["vllm:num_preemptions"] > 0
    assert drafted(preempted)
    assert preempted.token_ids == plain


def test_drafts_by_batch_size(prompts, plain, tmp_path):
    """No drafts while three or four requests run, drafts again when fewer do: no context was missed meanwhile."""
    lengths = [24, 24, MAX_TOKENS, MAX_TOKENS]
    runs = [RUN | {"name": "run", "prompts": prompts[:4], "max_tokens": lengths}]
    schedule = [[1, 2, 15], [3, 8, 0]]
    llm = BASE | dflash(num_speculative_tokens=15, num_speculative_tokens_per_batch_size=schedule)
    got = run_engine(tmp_path, llm, runs, runner="V2")["run"]
    assert got.token_ids == [ids[:length] for ids, length in zip(plain, lengths, strict=False)]
    for steps in got.step_lengths[:2]:
        assert max(steps) == 1
    for steps in got.step_lengths[2:]:
        assert set(steps[:20]) == {1} and max(steps[24:]) > 1


def test_sliding_and_full_layers(prompts, plain, oracle, tmp_path):
    """The shipped drafter, told to look back only 24 rows in its first layer."""
    drafter = tmp_path / "drafter"
    shutil.copytree(DRAFTER, drafter)
    config = json.loads((drafter / "config.json").read_text())
    layers = ["sliding_attention"] + ["full_attention"] * (config["num_hidden_layers"] - 1)
    config |= {"layer_types": layers, "use_sliding_window": True, "sliding_window": 24}
    (drafter / "config.json").write_text(json.dumps(config))
    run = RUN | {"name": "run", "prompts": prompts[:4]}
    got = run_engine(tmp_path, BASE | dflash(drafter), [run], runner="V2")["run"]
    rounds = oracle_rounds(drafter, prompts[:4], MAX_TOKENS)
    assert rounds != oracle[:4], "the window changes nothing"
    assert got.token_ids == plain[:4]
    assert_same_rounds(got, rounds)


def test_tensor_parallel(prompts, plain, tmp_path):
    """Every rank finds the likeliest token of its part of the vocabulary, and they agree on the best."""
    run = RUN | {"name": "tp2", "prompts": prompts[:3]}
    llm = BASE | dflash() | {"tensor_parallel_size": 2}
    tp2 = run_engine(tmp_path, llm, [run], runner="V2", VLLM_CPU_OMP_THREADS_BIND="0|1")["tp2"]
    assert tp2.token_ids == plain[:3]
    assert tp2.acceptance_length > 1.5


def test_block_verification_is_lossless(prompts, plain, tmp_path):
    """vLLM's other rejection sampler, which accepts or rejects a block as a whole. (Draft probabilities need a GPU: the
    interpreter cannot run vLLM's Gumbel kernel where that keeps the draft's logits.)"""
    run = RUN | {"name": "run", "prompts": prompts[:4]}
    got = run_engine(tmp_path, BASE | dflash(rejection_sample_method="block"), [run], runner="V2")["run"]
    assert got.token_ids == plain[:4]
    assert got.acceptance_length > 1.5
