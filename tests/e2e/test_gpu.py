# SPDX-License-Identifier: Apache-2.0
"""On a GPU, in bf16: drafting in CUDA graphs gives what it gives outside of them, and the text is the target's.

Temperature 0 in bf16 decides near-ties by rounding, which depends on a step's shape and on the kernels that were tuned
when an engine started. A third of these texts have two tokens with the same bf16 logit somewhere; which of them are
decided otherwise is seen to vary.
"""

from __future__ import annotations

import pytest

from tests.e2e.engines import PAIR, dflash
from tests.e2e.on_gpu import NUM_PROMPTS, assert_same_text, generate

pytestmark = [pytest.mark.engine, pytest.mark.gpu]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """vLLM without speculation."""
    return generate(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def in_graphs(tmp_path_factory):
    """This package, all defaults."""
    return generate(tmp_path_factory.mktemp("graphs"), **dflash())


def test_same_tokens_as_without_speculation(in_graphs, plain):
    assert_same_text(in_graphs, plain, most=NUM_PROMPTS // 8)
    assert in_graphs.acceptance_length > 5


def test_graph_is_eager(in_graphs, tmp_path):
    """The same compiled code without CUDA graphs: the same tokens in the same rounds."""
    eager = generate(tmp_path, **dflash(), compilation_config={"cudagraph_mode": "NONE"})
    assert eager.token_ids == in_graphs.token_ids
    assert eager.acceptance_length == pytest.approx(in_graphs.acceptance_length, rel=0.02)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(dflash(draft_sample_method="probabilistic"), id="probabilistic"),
        pytest.param(dflash() | {"additional_config": {"dflash": {"draft_weights": "fp8"}}}, id="fp8"),
        pytest.param(
            dflash()
            | {
                "additional_config": {"dflash": {"draft_vocab_size": 1024, "draft_vocab_file": f"{PAIR}/heldout.jsonl"}}
            },
            id="vocabulary",
        ),
    ],
)
def test_options_leave_the_text_alone(changes, plain, tmp_path):
    got = generate(tmp_path, **changes)
    assert_same_text(got, plain, most=NUM_PROMPTS // 8)
    assert got.acceptance_length > 4


def test_fp8_kv_cache(tmp_path):
    """Another target, in a way: compared with itself without speculation."""
    plain = generate(tmp_path / "plain", kv_cache_dtype="fp8")
    got = generate(tmp_path / "dflash", kv_cache_dtype="fp8", **dflash())
    same = sum(a == b for a, b in zip(got.token_ids, plain.token_ids, strict=True))
    assert same >= NUM_PROMPTS // 2  # FP8 keys and values make near-ties common
    assert got.acceptance_length > 3


NUM_NODES = 31


def with_trees(folder, tree=NUM_NODES, **changes):
    return generate(folder, **dflash(), additional_config={"dflash": {"tree": tree}}, **changes)


@pytest.fixture(scope="module")
def treed(tmp_path_factory):
    """Draft trees, all other defaults."""
    return with_trees(folder=tmp_path_factory.mktemp("trees"))


def test_trees_leave_the_text_alone(treed, in_graphs, plain):
    assert_same_text(treed, plain, most=NUM_PROMPTS // 4)
    assert treed.acceptance_length > 1.1 * in_graphs.acceptance_length


def test_trees_in_graphs_are_trees_outside(treed, tmp_path):
    eager = with_trees(folder=tmp_path, compilation_config={"cudagraph_mode": "NONE"})
    assert_same_text(eager, treed, most=NUM_PROMPTS // 8)
    assert eager.acceptance_length == pytest.approx(treed.acceptance_length, rel=0.02)


def test_trees_where_the_target_samples_of_its_first_choice(in_graphs, plain, tmp_path):
    """Top-k needs no history: such requests keep their trees, and of one token there is nothing to choose."""
    got = with_trees(folder=tmp_path, sampling={"temperature": 1.0, "top_k": 1})
    assert_same_text(got, plain, most=NUM_PROMPTS // 4)
    assert got.acceptance_length > in_graphs.acceptance_length


def test_trees_of_prompts_in_pieces(treed, tmp_path):
    """Verifications and prompts in one batch, outside of the graphs of decode steps."""
    pieces = with_trees(folder=tmp_path, max_num_batched_tokens=256, max_num_seqs=4)
    assert_same_text(pieces, treed, most=NUM_PROMPTS // 4)
    assert pieces.acceptance_length == pytest.approx(treed.acceptance_length, rel=0.02)


def test_trees_that_follow_the_load(plain, tmp_path):
    """Requests of other numbers of nodes, which the device shares out, in graphs for any of them."""
    auto = with_trees(tmp_path, "auto")
    assert_same_text(auto, plain, most=NUM_PROMPTS // 4)
    assert auto.acceptance_length > 5
    for part in ("verify", "draft"):
        seconds, count = (auto.counters[f"vllm_dflash:{part}_time_seconds_{what}"] for what in ("sum", "count"))
        assert count > 0 and 0 < seconds / count < 0.1


def test_trees_in_some_steps(plain, tmp_path):
    """Steps that verify nothing have graphs of their own, which read what the others have written, and the reverse."""
    some = with_trees(tmp_path, "auto", alternates=(2, 12))
    assert_same_text(some, plain, most=NUM_PROMPTS // 4)
    assert some.counters["vllm_dflash:fallbacks[does_not_pay]"] > 8
    accepted, drafts = some.counters["vllm:spec_decode_num_accepted_tokens"], "vllm_dflash:spec_decode_num_drafts"
    assert accepted / some.counters[drafts] > 4


def test_more_rows_to_read_than_a_step_has(plain, tmp_path):
    """Steps that verify and do not draft, beside prompts: the drafter reads 16 rows a request, the target 8."""
    limits = {"max_num_seqs": 40, "max_num_batched_tokens": 640}
    got = with_trees(tmp_path, "auto", alternates=(1, 1), num_prompts=2 * NUM_PROMPTS, **limits)
    assert_same_text(got, plain, most=NUM_PROMPTS // 4)


@pytest.mark.parametrize("tree", [None, 31, "auto"])
def test_defaults_of_a_server_on_a_large_card(tree, plain, tmp_path):
    """A full batch would draft more rows than a step has."""
    limits = {"max_num_seqs": 1024, "max_num_batched_tokens": 8192}
    got = with_trees(tmp_path, tree, **limits)
    assert_same_text(got, plain, most=NUM_PROMPTS // 4)
    assert got.acceptance_length > 5
