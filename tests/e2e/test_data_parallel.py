# SPDX-License-Identifier: Apache-2.0
"""Two data-parallel ranks on the V2 runner, one with more to do than the other: same token ids and rounds as alone.

vLLM keeps ranks in step for MoE targets only, and its CPU build cannot run experts on several ranks. So the shipped
target claims to have experts (`hf_overrides`): the ranks agree on every step's batch, and an idle one makes steps up.
"""

from __future__ import annotations

import pytest

from tests.e2e.engines import TARGET, dflash, held_out_prompts, run_data_parallel, run_engine

pytestmark = pytest.mark.engine

BASE = {
    "model": str(TARGET), "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 4, "max_num_batched_tokens": 128,
    "enable_prefix_caching": True, "block_size": 32,
}  # fmt: skip
#: A busy rank's tokens by prompt, and those of a rank that is soon idle.
LENGTHS = [[24, 64, 16], [12]]


@pytest.fixture(scope="module")
def runs_by_rank():
    """Of each rank: a batch, then the same prompts from the prefix cache. One prompt is prefilled in chunks."""
    prompts = held_out_prompts(9)
    prompts_by_rank = [[prompts[0], prompts[7] + prompts[8], prompts[1]], [prompts[4]]]
    return [
        [
            {"name": f"rank {rank} {name}", "prompts": prompts_by_rank[rank], "max_tokens": LENGTHS[rank]}
            for name in ("first", "cached")
        ]
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def plain(runs_by_rank, tmp_path_factory):
    """vLLM without speculation, on the V1 runner."""
    return run_engine(tmp_path_factory.mktemp("plain"), BASE, sum(runs_by_rank, []))


@pytest.fixture(scope="module")
def alone(runs_by_rank, tmp_path_factory):
    """This package on one rank: what each has to do, one after the other."""
    return run_engine(tmp_path_factory.mktemp("alone"), BASE | dflash(), sum(runs_by_rank, []), runner="V2")


@pytest.fixture(scope="module")
def parallel(runs_by_rank, tmp_path_factory):
    """This package on two ranks at once."""
    llm = BASE | dflash() | {"hf_overrides": {"num_experts": 2}}
    return run_data_parallel(tmp_path_factory.mktemp("parallel"), llm, runs_by_rank, runner="V2")


def test_load_is_uneven(parallel):
    """Guards against a vacuous pass: one rank must be idle while the other drafts."""
    busy, idle = (max(map(len, parallel[f"rank {rank} first"].step_lengths)) for rank in range(2))
    assert busy > idle + 3


def test_same_tokens_as_without_speculation(parallel, plain):
    assert parallel["rank 0 first"].acceptance_length > 1.5
    assert {name: run.token_ids for name, run in parallel.items()} == {
        name: run.token_ids for name, run in plain.items()
    }


def test_same_rounds_as_alone(parallel, alone):
    """The cached runs read draft K/V that no made-up step may have touched."""
    assert parallel["rank 1 cached"].counters["vllm:prefix_cache_hits"] > 0
    assert {name: run.step_lengths for name, run in parallel.items()} == {
        name: run.step_lengths for name, run in alone.items()
    }
