# SPDX-License-Identifier: Apache-2.0
"""At temperature 0 in fp32, the token ids are those of vLLM without speculation, in every mode of the engine."""

from __future__ import annotations

import pytest

from tests.e2e.engines import DRAFTER, TARGET, dflash, held_out_prompts, run_engine, with_idle_head

pytestmark = pytest.mark.engine

NUM_PROMPTS, MAX_TOKENS = 32, 128
BASE = {"model": str(TARGET), "dtype": "float32", "max_model_len": 1024}


@pytest.fixture(scope="module")
def prompts():
    return held_out_prompts(NUM_PROMPTS)


@pytest.fixture(scope="module")
def reference(prompts, tmp_path_factory):
    """vLLM without speculation, one request after the other."""
    run = {"name": "alone", "prompts": prompts, "max_tokens": MAX_TOKENS, "concurrent": False}
    return run_engine(tmp_path_factory.mktemp("reference"), BASE, [run])["alone"].token_ids


@pytest.fixture(scope="module")
def speculative(prompts, tmp_path_factory):
    """One engine with DFlash: alone, batched, and once more with every prompt in the prefix cache."""
    run = {"prompts": prompts, "max_tokens": MAX_TOKENS}
    runs = [
        run | {"name": "alone", "concurrent": False},
        run | {"name": "batched"},
        run | {"name": "cached"},
    ]
    llm = BASE | dflash() | {"enable_prefix_caching": True, "block_size": 32}
    return run_engine(tmp_path_factory.mktemp("speculative"), llm, runs)


def assert_same(got, reference):
    differing = [i for i, (a, b) in enumerate(zip(got, reference, strict=True)) if a != b]
    assert not differing, f"prompts {differing} differ; first: {got[differing[0]]} != {reference[differing[0]]}"


def drafted(run) -> bool:
    """Guards against a vacuous pass: most tokens must have come from accepted drafts."""
    return run.counters["vllm:spec_decode_num_accepted_tokens"] > NUM_PROMPTS * MAX_TOKENS / 2


def test_alone(speculative, reference):
    assert drafted(speculative["alone"])
    assert_same(speculative["alone"].token_ids, reference)


def test_batched(speculative, reference):
    assert drafted(speculative["batched"])
    assert_same(speculative["batched"].token_ids, reference)


def test_prefix_cache_hit(speculative, reference):
    hits = speculative["cached"].counters["vllm:prefix_cache_hits"]
    assert hits > 0
    assert drafted(speculative["cached"])
    assert_same(speculative["cached"].token_ids, reference)


def test_prefix_cache_keeps_acceptance(speculative):
    """Cached prompts bring the draft layers' K/V along: a hole there would only show as worse drafts."""
    assert speculative["cached"].acceptance_length == pytest.approx(speculative["batched"].acceptance_length, rel=0.02)


def test_chunked_prefill(prompts, reference, tmp_path):
    """Prompts of 40 to 200 tokens in pieces of at most 48 rows, mixed with decoding requests."""
    run = {"name": "chunked", "prompts": prompts, "max_tokens": MAX_TOKENS}
    llm = BASE | dflash() | {"max_num_batched_tokens": 48, "max_num_seqs": 4, "enable_prefix_caching": False}
    chunked = run_engine(tmp_path, llm, [run])["chunked"]
    assert drafted(chunked)
    assert_same(chunked.token_ids, reference)


def test_preemption(prompts, reference, tmp_path):
    """A cache far too small for the batch: requests lose their blocks midway and start over."""
    run = {"name": "preempted", "prompts": prompts, "max_tokens": MAX_TOKENS}
    llm = BASE | dflash() | {"num_gpu_blocks_override": 40, "block_size": 32, "enable_prefix_caching": False}
    preempted = run_engine(tmp_path, llm, [run])["preempted"]
    assert preempted.counters["vllm:num_preemptions"] > 0
    assert drafted(preempted)
    assert_same(preempted.token_ids, reference)


def test_tensor_parallel(prompts, reference, tmp_path):
    run = {"name": "tp2", "prompts": prompts, "max_tokens": MAX_TOKENS}
    llm = BASE | dflash() | {"tensor_parallel_size": 2}
    tp2 = run_engine(tmp_path, llm, [run], VLLM_CPU_OMP_THREADS_BIND="0|1")["tp2"]
    assert drafted(tp2)
    assert_same(tp2.token_ids, reference)


@pytest.fixture(scope="module")
def odd_drafter(tmp_path_factory):
    """The shipped drafter with a third key/value head, which nothing reads: two ranks cannot share it out."""
    return with_idle_head(DRAFTER, tmp_path_factory.mktemp("odd") / "drafter")


def test_whole_drafter_on_every_rank(prompts, speculative, reference, odd_drafter, tmp_path):
    """`"draft_tensor_parallel_size": 1`: same texts in the same rounds as on one rank."""
    run = {"name": "whole", "prompts": prompts, "max_tokens": MAX_TOKENS}
    llm = BASE | dflash(odd_drafter, draft_tensor_parallel_size=1) | {"tensor_parallel_size": 2}
    whole = run_engine(tmp_path, llm, [run], VLLM_CPU_OMP_THREADS_BIND="0|1")["whole"]
    assert_same(whole.token_ids, reference)
    assert whole.acceptance_length == pytest.approx(speculative["batched"].acceptance_length, rel=0.01)


def test_near_max_model_len(prompts, tmp_path):
    """Requests that end at max_model_len: drafts past it are cut request by request, the others keep drafting."""
    limit = len(prompts[0]) + 40
    short = [prompts[0], prompts[1][:20], prompts[2][:20]]
    run = {"prompts": short, "max_tokens": limit}
    plain = run_engine(tmp_path / "plain", BASE | {"max_model_len": limit}, [run | {"name": "limit"}])["limit"]
    spec = run_engine(tmp_path / "spec", BASE | dflash() | {"max_model_len": limit}, [run | {"name": "limit"}])["limit"]
    assert_same(spec.token_ids, plain.token_ids)
    assert max(map(len, spec.token_ids)) > 40
