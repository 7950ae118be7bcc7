# SPDX-License-Identifier: Apache-2.0
"""Draft trees in vLLM's V2 runner: the token ids are those without speculation, the rounds those of `spec_generate`.

Without a GPU, vLLM's kernels run in Triton's interpreter, so batches are small and texts short.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, Qwen3Config, Qwen3MoeConfig

from tests.e2e.engines import DRAFTER, TARGET, dflash, held_out_prompts, run_engine, with_idle_head
from tests.e2e.oracle import assert_same_rounds, oracle_rounds
from vllm_dflash.hf import DFlashDraftModel

pytestmark = pytest.mark.engine

NUM_PROMPTS, MAX_TOKENS, NUM_NODES = 6, 40, 15
BASE = {"model": str(TARGET), "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 8}
RUN = {"max_tokens": MAX_TOKENS}
SEEDED = RUN | {"name": "seeded", "temperature": 0.7, "seed": 11}
#: Requests whose logits depend on the tokens before them, beside two that do not. `\\n` ends a line of the grammar's.
MIXED_SAMPLING = [
    {"logprobs": 1},
    {"presence_penalty": 0.8, "repetition_penalty": 1.2},
    {"structured_outputs": {"regex": "( *[a-z_]+ = [0-9]+\\n)+"}},
    {"frequency_penalty": 0.5, "min_tokens": 8},
    {},
    {"repetition_penalty": 1.5},
]
TOY = {
    "vocab_size": 8, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 32, "max_position_embeddings": 128, "initializer_range": 0.3,
}  # fmt: skip
MIXED = RUN | {"name": "mixed", "sampling": MIXED_SAMPLING}


def trees(num_nodes: int | str = NUM_NODES) -> dict:
    return dflash() | {"additional_config": {"dflash": {"tree": num_nodes}}}


@pytest.fixture(scope="module")
def prompts():
    return held_out_prompts(NUM_PROMPTS)


@pytest.fixture(scope="module")
def engines(prompts, tmp_path_factory):
    """Without speculation, on the V2 runner, whose noise is keyed by seed and position; and with trees, the first run
    again from the prefix cache. Side by side."""
    greedy, cached = (RUN | {"name": name} for name in ("greedy", "cached"))
    jobs = {"plain": (BASE, [greedy, SEEDED, MIXED]), "treed": (BASE | trees(), [greedy, cached, SEEDED, MIXED])}
    folders = {name: tmp_path_factory.mktemp(name) for name in jobs}  # not made in threads

    def run(name):
        llm, runs = jobs[name]
        llm = llm | {"skip_tokenizer_init": False, "enable_prefix_caching": True, "block_size": 32}
        runs = [run | {"prompts": prompts} for run in runs]
        return run_engine(folders[name], llm, runs, runner="V2", VLLM_CPU_OMP_THREADS_BIND="nobind")

    with ThreadPoolExecutor() as pool:
        return dict(zip(jobs, pool.map(run, jobs), strict=True))


@pytest.fixture(scope="module")
def plain(engines):
    return engines["plain"]


@pytest.fixture(scope="module")
def treed(engines):
    return engines["treed"]


def drafted(run) -> bool:
    """Guards against a vacuous pass: many tokens must have come from accepted candidates."""
    return run.counters["vllm:spec_decode_num_accepted_tokens"] > sum(map(len, run.token_ids)) / 2


def test_same_tokens_as_without_speculation(treed, plain):
    assert drafted(treed["greedy"])
    assert treed["greedy"].token_ids == plain["greedy"].token_ids


def test_same_rounds_as_the_oracle(treed, prompts):
    assert_same_rounds(treed["greedy"], oracle_rounds(DRAFTER, prompts, MAX_TOKENS, NUM_NODES))


def test_prefix_cache_hit(treed, plain):
    """What the cache holds are the accepted rows, moved to their places."""
    assert treed["cached"].counters["vllm:prefix_cache_hits"] > 0
    assert treed["cached"].token_ids == plain["greedy"].token_ids


def test_same_samples_as_without_speculation(treed, plain):
    """Token for token: the noise is keyed by seed and position, and the target is sampled at every node."""
    assert treed["seeded"].counters["vllm:spec_decode_num_accepted_tokens"] > NUM_PROMPTS
    assert treed["seeded"].token_ids == plain["seeded"].token_ids
    assert plain["seeded"].token_ids != plain["greedy"].token_ids


def test_chains_in_a_batch_of_trees(treed, plain):
    """Penalties and grammars see the tokens before them, so their requests run as chains beside the trees."""
    assert treed["mixed"].token_ids == plain["mixed"].token_ids
    for index, steps in enumerate(treed["mixed"].step_lengths):
        assert max(steps) > 1, f"no candidate of request {index} was accepted"
    for index in (1, 2, 3, 5):
        assert plain["mixed"].token_ids[index] != plain["greedy"].token_ids[index], f"request {index} is not special"


def test_metrics(treed):
    """Positions are depths: of each tree at most one node at each is accepted. Four of the mixed requests look back."""
    for name, chains in (("greedy", 0), ("mixed", 4)):
        counters = treed[name].counters
        assert counters["vllm_dflash:fallbacks[chain_sampling]"] == chains
        drafts, planned = counters["vllm_dflash:spec_decode_num_drafts"], counters["vllm:spec_decode_num_drafts"]
        # A grammar may take all tokens of a draft.
        assert drafts == planned if name == "greedy" else planned / 2 < drafts <= planned
        assert counters["vllm_dflash:spec_decode_num_verified_nodes"] == counters["vllm:spec_decode_num_draft_tokens"]
        accepted, drafted = (
            [counters[f"vllm_dflash:spec_decode_num_{what}_tokens_per_pos[{place}]"] for place in range(15)]
            for what in ("accepted", "draft")
        )
        assert drafted[0] == drafts
        assert sum(accepted) == counters["vllm:spec_decode_num_accepted_tokens"]
        assert all(some <= of for some, of in zip(accepted, drafted, strict=True))
        assert counters["vllm_dflash:draft_time_seconds_count"] > 0


def test_logprobs_are_those_of_the_accepted_rows(treed, plain):
    got, expected = treed["mixed"].logprobs[0], plain["mixed"].logprobs[0]
    assert len(got) == MAX_TOKENS and len({round(value, 3) for value in expected}) > MAX_TOKENS / 4
    assert got == pytest.approx(expected, abs=1e-3)


def test_chunked_prefill(prompts, plain, tmp_path):
    """Prompts in pieces, mixed with a request that verifies a tree."""
    run = RUN | {"name": "chunked", "prompts": prompts[:4]}
    llm = BASE | trees() | {"max_num_batched_tokens": 40, "max_num_seqs": 2, "enable_prefix_caching": False}
    chunked = run_engine(tmp_path, llm, [run], runner="V2")["chunked"]
    assert chunked.token_ids == plain["greedy"].token_ids[:4]
    assert_same_rounds(chunked, oracle_rounds(DRAFTER, prompts[:4], MAX_TOKENS, NUM_NODES))


def test_preemption(prompts, plain, tmp_path):
    """A cache far too small for the batch, and a limit of length that cuts trees to their first nodes."""
    run = RUN | {"name": "preempted", "prompts": prompts}
    longest = max(map(len, prompts)) + MAX_TOKENS
    llm = BASE | trees() | {"num_gpu_blocks_override": 13, "block_size": 32, "max_model_len": longest}
    preempted = run_engine(tmp_path, llm, [run], runner="V2")["preempted"]
    assert preempted.counters["vllm:num_preemptions"] > 0
    assert drafted(preempted)
    assert preempted.token_ids == plain["greedy"].token_ids


def test_nodes_by_batch_size(prompts, plain, tmp_path):
    """vLLM's dynamic speculation cuts trees to their first nodes, or to none."""
    lengths = [16, 16, MAX_TOKENS, MAX_TOKENS]
    runs = [RUN | {"name": "run", "prompts": prompts[:4], "max_tokens": lengths}]
    llm = BASE | trees()
    llm["speculative_config"]["num_speculative_tokens_per_batch_size"] = [[1, 2, 6], [3, 8, 0]]
    got = run_engine(tmp_path, llm, runs, runner="V2")["run"]
    assert got.token_ids == [ids[:length] for ids, length in zip(plain["greedy"].token_ids, lengths, strict=False)]
    for steps in got.step_lengths[:2]:
        assert max(steps) == 1
    for steps in got.step_lengths[2:]:
        assert set(steps[:12]) == {1} and max(steps[16:]) > 1


def test_nodes_that_follow_the_load(prompts, plain, tmp_path):
    """Six requests have room for so many nodes that not all pay: the device shares them out. Prompts in pieces beside
    verifications, penalties and grammars beside trees: the text is the same."""
    llm = BASE | trees("auto") | {"skip_tokenizer_init": False, "max_num_batched_tokens": 320}
    llm["speculative_config"]["num_speculative_tokens"] = 23
    run = MIXED | {"prompts": prompts}
    mixed = run_engine(tmp_path, llm, [run], runner="V2", VLLM_CPU_OMP_THREADS_BIND="nobind")["mixed"]
    assert mixed.token_ids == plain["mixed"].token_ids
    assert mixed.counters["vllm:spec_decode_num_accepted_tokens"] > NUM_PROMPTS
    nodes = mixed.counters["vllm:spec_decode_num_draft_tokens"] / mixed.counters["vllm:spec_decode_num_drafts"]
    assert 3 < nodes < 22, "not shared out"
    drafts = mixed.counters["vllm_dflash:spec_decode_num_drafts"]
    assert 0 < mixed.counters["vllm_dflash:spec_decode_num_accepted_tokens_per_pos[0]"] <= drafts
    assert drafts <= mixed.counters["vllm:spec_decode_num_drafts"]
    assert mixed.counters["vllm_dflash:fallbacks[chain_sampling]"] == 4
    assert mixed.counters["vllm_dflash:fallbacks[assumed_costs]"] == 1
    requests = mixed.counters["vllm_dflash:tree_budget_requests"]  # of the last step
    assert 1 <= requests <= NUM_PROMPTS
    assert 0 <= mixed.counters["vllm_dflash:tree_budget_nodes"] <= 23 * requests


def test_steps_without_drafts(prompts, plain, tmp_path):
    """Two steps draft, twelve do not, and so on: what these wrote into the caches is there when the next ones draft.

    Requests end, and a fifth one comes, while others' context is still to be written.
    """
    llm = BASE | trees("auto") | {"enable_prefix_caching": True, "block_size": 32, "max_num_seqs": 4}
    llm["speculative_config"]["num_speculative_tokens"] = 15
    run = RUN | {"name": "run", "prompts": prompts[:5], "max_tokens": [9, *[MAX_TOKENS] * 4]}
    got = run_engine(tmp_path, llm, [run], runner="V2", alternates=(2, 12), VLLM_CPU_OMP_THREADS_BIND="nobind")["run"]
    assert got.token_ids == [plain["greedy"].token_ids[0][:9], *plain["greedy"].token_ids[1:5]]
    assert got.counters["vllm_dflash:fallbacks[does_not_pay]"] >= 8
    accepted, drafts = got.counters["vllm:spec_decode_num_accepted_tokens"], "vllm_dflash:spec_decode_num_drafts"
    assert accepted / got.counters[drafts] > 4


def test_tensor_parallel(prompts, plain, tmp_path):
    """Both ranks build the same trees, walk the same way and move their own heads' K/V."""
    run = RUN | {"name": "tp2", "prompts": prompts[:3]}
    llm = BASE | trees() | {"tensor_parallel_size": 2}
    tp2 = run_engine(tmp_path, llm, [run], runner="V2", VLLM_CPU_OMP_THREADS_BIND="0|1")["tp2"]
    assert drafted(tp2)
    assert tp2.token_ids == plain["greedy"].token_ids[:3]


def test_whole_drafter_on_every_rank(prompts, plain, tmp_path):
    """`"draft_tensor_parallel_size": 1`, of a drafter that two ranks could not share out."""
    run = RUN | {"name": "whole", "prompts": prompts[:3]}
    llm = BASE | trees() | {"tensor_parallel_size": 2}
    llm |= dflash(with_idle_head(DRAFTER, tmp_path / "drafter"), draft_tensor_parallel_size=1)
    whole = run_engine(tmp_path, llm, [run], runner="V2", VLLM_CPU_OMP_THREADS_BIND="0|1")["whole"]
    assert whole.token_ids == plain["greedy"].token_ids[:3]
    assert_same_rounds(whole, oracle_rounds(DRAFTER, prompts[:3], MAX_TOKENS, NUM_NODES))


def toy_pair(folder, target_config):
    """A random target of eight tokens, most of which a tree of seven nodes holds, and a random drafter."""
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(target_config).save_pretrained(folder / "target")
    config = Qwen3Config(
        **TOY, num_hidden_layers=1, architectures=["DFlashDraftModel"], block_size=4, num_target_layers=4,
        dflash_config={"mask_token_id": 7, "target_layer_ids": [1, 2]},
    )  # fmt: skip
    DFlashDraftModel(config).save_pretrained(folder / "drafter")


@pytest.mark.parametrize(
    "target_config",
    [
        MistralConfig(**TOY, num_hidden_layers=4, sliding_window=24),
        Qwen3MoeConfig(
            **TOY,
            num_hidden_layers=4,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            norm_topk_prob=True,
        ),
    ],
    ids=["sliding windows", "experts"],
)
def test_other_targets(target_config, tmp_path):
    toy_pair(tmp_path, target_config)
    llm = {"model": str(tmp_path / "target"), "dtype": "float32", "max_model_len": 128, "max_num_seqs": 4}
    run = {"name": "toy", "max_tokens": 40, "prompts": [[place % 7 for place in range(n)] for n in (40, 7, 29)]}
    expected = run_engine(tmp_path / "plain", llm, [run])["toy"].token_ids
    treed = llm | dflash(tmp_path / "drafter") | {"additional_config": {"dflash": {"tree": 7}}}
    got = run_engine(tmp_path / "treed", treed, [run], runner="V2")["toy"]
    assert got.token_ids == expected
    assert got.acceptance_length > 1.1
    assert len(set(expected[0])) > 3, "a text that says nothing of the order of its tokens"
