# SPDX-License-Identifier: Apache-2.0
"""Draft trees inside vLLM, part by part, on one tree written out by hand.

root -+- 10
      +- 11 -+- 20
             +- 21 --- 30
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")
import torch
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState

from vllm_dflash.compat.ownership import TreeShape
from vllm_dflash.compat.trees.attention import visible_slots
from vllm_dflash.compat.trees.compaction import AcceptedRows
from vllm_dflash.compat.trees.model_state import TreeModelState, depends_on_path
from vllm_dflash.compat.trees.sampler import TreeSampler
from vllm_dflash.compat.trees.store import TreeStore
from vllm_dflash.proposer.trees import drafted_trees, empty_trees, padded_chain
from vllm_dflash.tree import ROOT, DraftTree

CPU = torch.device("cpu")
TOKENS, PARENTS, DEPTHS = [10, 11, 20, 21, 30], [ROOT, ROOT, 1, 1, 3], [1, 1, 2, 2, 3]
SHAPE = TreeShape(num_nodes=5, num_depths=3)
NOTHING = -7  # of a row that the test does not look at


def tree() -> DraftTree:
    columns = [torch.tensor([column]) for column in (TOKENS, PARENTS, DEPTHS)]
    return DraftTree(*columns, torch.zeros(1, 5), torch.ones(1, 5, dtype=torch.bool))


def store(rows: int = 4, kept_at: int = 2) -> TreeStore:
    trees = TreeStore(rows, SHAPE, CPU)
    trees.keep(torch.tensor([kept_at], dtype=torch.int32), tree())
    return trees


# Drafting.


def logits_of(*likeliest: list[int], size: int = 8) -> torch.Tensor:
    """One request's logits [1, K, V]: at each depth these tokens, in this order, and then all others."""
    depths = []
    for tokens in likeliest:
        row = torch.zeros(size)
        for rank, token in enumerate(tokens):
            row[token] = 4.0 - rank
        depths.append(row)
    return torch.stack(depths)[None]


def test_a_tree_and_a_chain_of_the_same_logits() -> None:
    logits = logits_of([3, 5], [6, 2]).expand(2, -1, -1)
    drafted = drafted_trees(logits, torch.zeros(2), torch.tensor([False, True]), 4)
    # Log-odds to the likeliest: 3 and 6 0, 5 and 2 -1, so 36 0, then 5, 56 and 32 -1 more; 3 comes before 36.
    assert drafted.token_ids.tolist() == [[3, 6, 5, 2], [3, 6, 0, 0]]
    assert drafted.parents.tolist() == [[ROOT, 0, ROOT, 0], [ROOT, 0, ROOT, ROOT]]
    assert drafted.depths.tolist() == [[1, 2, 1, 2], [1, 2, 1, 1]]
    assert drafted.is_node.tolist() == [[True] * 4, [True, True, False, False]]
    p = logits[0].softmax(dim=-1)
    torch.testing.assert_close(drafted.log_probs[0, :2].exp(), torch.stack((p[0, 3], p[0, 3] * p[1, 6])))


def test_a_high_temperature_makes_wide_trees() -> None:
    logits = logits_of([3, 5], [6, 2]).expand(3, -1, -1)
    drafted = drafted_trees(logits, torch.tensor([0.0, 1.0, 100.0]), torch.zeros(3, dtype=torch.bool), 3)
    assert drafted.depths.tolist() == [[1, 2, 1], [1, 2, 1], [1, 1, 1]]
    torch.testing.assert_close(drafted.log_probs[2, 0].exp(), (logits[0, 0] / 100).softmax(dim=-1)[3])


def test_what_cannot_be_drafted_is_no_node() -> None:
    logits = torch.full((1, 1, 6), float("-inf"))
    logits[0, 0, [1, 4]] = torch.tensor([0.0, 1.0])
    drafted = drafted_trees(logits, torch.zeros(1), torch.tensor([False]), 3)
    assert drafted.token_ids[0, :2].tolist() == [4, 1]
    assert drafted.is_node.tolist() == [[True, True, False]]


@pytest.mark.parametrize(
    ("num_nodes", "tokens", "is_node"), [(2, [7, 8], [1, 1]), (5, [7, 8, 9, 0, 0], [1, 1, 1, 0, 0])]
)
def test_a_chain_is_cut_or_filled_up(num_nodes: int, tokens: list[int], is_node: list[int]) -> None:
    chain = padded_chain(torch.tensor([[7, 8, 9]]), num_nodes)
    assert chain.token_ids.tolist() == [tokens]
    assert chain.is_node.int().tolist() == [is_node]
    assert chain.parents[0, :2].tolist() == [ROOT, 0]


def test_memory_of_trees_is_overwritten_in_place() -> None:
    memory = empty_trees(3, 5, CPU)
    addresses = [column.data_ptr() for column in vars(memory).values()]
    assert not memory.is_node.any()
    memory.overwrite(tree())
    assert memory.parents[0].tolist() == PARENTS
    assert memory.rows(1).token_ids.tolist() == [TOKENS]
    assert not memory.is_node[1:].any()
    assert [column.data_ptr() for column in vars(memory).values()] == addresses


# What is kept from step to step.


def test_a_row_taken_over_holds_no_tree() -> None:
    trees = store(kept_at=2)
    trees.begin(2, as_chain=True)
    read = trees.read(torch.tensor([2]), torch.tensor([TOKENS]), torch.ones(1, 5, dtype=torch.bool))
    assert not read.is_node.any()
    assert trees.as_chain.tolist() == [False, False, True, False]


def test_depths_of_rows() -> None:
    trees = store(kept_at=2)
    depths = trees.row_depths(torch.tensor([2] * 6 + [0]), torch.tensor([0, 1, 2, 3, 4, 5, 0]))
    assert depths.tolist() == [0, *DEPTHS, 0]


def begin_step(trees: TreeStore, state_rows: list[int], rows: list[int], num_logits: list[int]) -> None:
    """A step of requests with so many rows, of which so many verify."""
    query_start_loc = torch.tensor([0, *np.cumsum(rows)])
    cu_num_logits = torch.tensor([0, *np.cumsum(num_logits)])
    trees.begin_step(torch.tensor(state_rows), query_start_loc, cu_num_logits, np.array(num_logits) - 1)


def test_what_a_step_verifies() -> None:
    trees = store(kept_at=2)
    begin_step(trees, [0, 2], rows=[3, 8], num_logits=[1, 6])
    step = trees.step
    assert step is not None
    # Bit 0 is the root: 10 sees 1 and 0, 11 2 and 0, 20 those and 3, 21 instead of it 4, 30 those and 5.
    assert step.ancestor_words[1, :, 0].tolist() == [0b1, 0b11, 0b101, 0b1101, 0b10101, 0b110101]
    assert step.depths[1].tolist() == [0, *DEPTHS]
    assert step.first_rows.tolist() == [2, 5]
    assert step.num_rows.tolist() == [0, 6]
    assert step.num_drafts.tolist() == [0, 5]


def test_a_step_that_verifies_nothing() -> None:
    trees = store(kept_at=2)
    begin_step(trees, [2], rows=[6], num_logits=[6])
    begin_step(trees, [2], rows=[1], num_logits=[1])
    assert trees.step is None
    trees.begin_step(torch.tensor([2]), torch.tensor([0, 4]), torch.tensor([0, 1]), None)
    assert trees.step is None


def test_a_row_sees_what_is_before_it() -> None:
    assert visible_slots(torch.tensor([2, 3]), 4, -1).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert visible_slots(torch.tensor([3, 4, 4, 6]), 3, -1).all()


def test_a_window_counts_positions() -> None:
    visible = visible_slots(torch.tensor([4, 5, 5, 6]), 4, 3)
    assert visible.int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]


# The target's way.


def walk(said: list[int], tokens: list[int], cu_num_logits: list[int], state_rows: list[int], trees: TreeStore) -> Any:
    sampler = TreeSampler.__new__(TreeSampler)
    sampler.trees = trees
    sampled, num_sampled = sampler._walk(
        torch.tensor(said), torch.tensor(tokens), torch.tensor(cu_num_logits), torch.tensor(state_rows)
    )
    rows = sampler._rows_by_output
    assert rows is not None
    texts = [row[:count] for row, count in zip(sampled.tolist(), num_sampled.tolist(), strict=True)]
    return texts, rows.tolist()


def test_the_way_by_hand() -> None:
    trees = store(kept_at=2)
    # After the root 11, after 11 21, after 21 (row 4) 99: two candidates are accepted.
    said = [11, NOTHING, 21, NOTHING, 99, NOTHING]
    texts, rows = walk(said, [NOTHING, *TOKENS], [0, 6], [2], trees)
    assert texts == [[11, 21, 99]]
    assert trees.way[2, :2].tolist() == [2, 4]
    assert rows[:3] == [0, 2, 4]  # the logits that each was sampled from


def test_cut_trees_and_requests_without_any() -> None:
    trees = store(kept_at=2)
    # Request 0 has no candidates; of request 1's only 10 and 11 were scheduled, though 21 would be right.
    texts, rows = walk([55, 11, NOTHING, 21], [NOTHING, NOTHING, 10, 11], [0, 1, 4], [0, 2], trees)
    assert texts == [[55], [11, 21]]
    assert rows == [0, 1, 3, 3]


def test_a_token_that_must_not_be_accepted() -> None:
    texts, _ = walk([11, NOTHING, 21, NOTHING, 99, NOTHING], [NOTHING, 10, 11, 20, -1, 30], [0, 6], [2], store())
    assert texts == [[11, 21]]


def test_what_is_no_node_is_not_accepted() -> None:
    trees = TreeStore(4, SHAPE, CPU)
    texts, _ = walk([0] * 6, [NOTHING, 0, 0, 0, 0, 0], [0, 6], [2], trees)
    assert texts == [[0]]


# Compaction.


def accepted_rows(trees: TreeStore) -> AcceptedRows:
    """Two requests: a prompt of three rows, and a verification of six behind it that accepted rows 2 and 4."""
    walk([11, NOTHING, 21, NOTHING, 99, NOTHING], [NOTHING, *TOKENS], [0, 6], [2], trees)
    begin_step(trees, [0, 2], rows=[3, 6], num_logits=[1, 6])
    return AcceptedRows.of(trees, torch.tensor([0, 2]), torch.tensor([1, 3]))


def test_accepted_rows_become_consecutive() -> None:
    states = torch.arange(9.0)[:, None]
    moved = accepted_rows(store()).move_states(states)
    assert moved[:6, 0].tolist() == [0, 1, 2, 3, 5, 7]  # root in row 3, candidates in 4 ..
    assert states[:, 0].tolist() == list(range(9))


def test_their_kv_too() -> None:
    cache = torch.arange(16.0).view(4, 1, 4, 1).clone()  # 4 blocks of 4 slots; a slot holds its number
    slots = torch.tensor([12, 13, 14, 2, 3, 8, 9, 10, 11])  # the verification goes over from block 0 to block 2
    accepted_rows(store()).move_kv([("layer", cache)], {"layer": slots})
    expected = list(range(16))
    expected[3], expected[8] = 8, 10  # row 2 of the verification to its row 1, row 4 to row 2
    assert cache.flatten().tolist() == expected


# Requests that cannot have trees.


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, False),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_tokens": 4, "logprobs": 2}, False),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -0.1}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"bad_words": ["no"]}, True),
        ({"structured_outputs": StructuredOutputsParams(regex="a+")}, True),
    ],
)
def test_which_logits_depend_on_the_path(params: dict[str, Any], expected: bool) -> None:
    assert depends_on_path(SamplingParams(**params)) is expected


def test_processors_of_others_make_every_request_a_chain() -> None:
    state = TreeModelState.__new__(TreeModelState)
    state.vllm_config = SimpleNamespace(
        speculative_config=SimpleNamespace(
            num_speculative_tokens=5, enable_adaptive_verification=False, rejection_sample_method="standard"
        )
    )
    state.device, state.trees = CPU, store()
    for processors, expected in (([], False), ([BadWordsState.__new__(BadWordsState)], False), ([object()], True)):
        sampler = SimpleNamespace(logits_processors=processors)
        same, ours = state.custom_sampler(sampler)
        assert same is sampler and isinstance(ours, TreeSampler)
        assert state.all_as_chain is expected
