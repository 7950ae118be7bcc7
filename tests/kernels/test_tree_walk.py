# SPDX-License-Identifier: Apache-2.0
"""The target's way through trees in one launch: against the walk in plain torch, and one tree written out by hand.

root -+- 10
      +- 11 -+- 20
             +- 21 --- 30
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dflash.kernels.tree_walk import walk_trees
from vllm_dflash.tree import ROOT, DraftTree, ancestor_mask, walk

TOKENS, PARENTS = [10, 11, 20, 21, 30], [ROOT, ROOT, 1, 1, 3]
NOTHING = -7  # of a row that the test does not look at


def walked(
    device: str, said: list[int], tokens: list[int], cu_num_logits: list[int], state_rows: list[int]
) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Texts, ways and rows of logits. The tree above is in row 2 of four, and row 0 holds nothing."""
    parents = torch.tensor([PARENTS] * 4, dtype=torch.int32, device=device)
    is_node = torch.zeros(4, 5, dtype=torch.bool, device=device)
    is_node[2] = True
    way = torch.zeros(4, 3, dtype=torch.int32, device=device)
    said_at, num_said = torch.full_like(way, NOTHING), torch.zeros(4, dtype=torch.int32, device=device)
    columns = (torch.tensor(column, device=device) for column in (said, tokens, cu_num_logits, state_rows))
    sampled, num_sampled, rows = walk_trees(*columns, parents, is_node, way, said_at, num_said)
    counts = num_sampled.tolist()
    assert num_said[state_rows].tolist() == [min(count, 3) for count in counts]
    for request, (row, count) in enumerate(zip(state_rows, counts, strict=True)):
        assert said_at[row, :count].tolist() == sampled[request, : min(count, 3)].tolist()
    texts = [row[:count] for row, count in zip(sampled.tolist(), counts, strict=True)]
    assert not any(token for row, count in zip(sampled.tolist(), counts, strict=True) for token in row[count:])
    ways = [way[row, : count - 1].tolist() for row, count in zip(state_rows, counts, strict=True)]
    return texts, ways, rows.tolist()


def test_the_way_by_hand(device: str) -> None:
    # After the root 11, after 11 21, after 21 (row 4) 99: two candidates are accepted.
    texts, ways, rows = walked(device, [11, NOTHING, 21, NOTHING, 99, NOTHING], [NOTHING, *TOKENS], [0, 6], [2])
    assert texts == [[11, 21, 99]]
    assert ways == [[2, 4]]
    assert rows == [0, 2, 4, 3, 4, 5]  # the logits that each was sampled from, and what nobody reads


def test_all_the_way_down(device: str) -> None:
    said = [11, NOTHING, 21, NOTHING, 30, 77]
    texts, ways, _ = walked(device, said, [NOTHING, *TOKENS], [0, 6], [2])
    assert texts == [[11, 21, 30, 77]]
    assert ways == [[2, 4, 5]]


def test_cut_trees_and_requests_without_any(device: str) -> None:
    # Request 0 has no candidates; of request 1's only 10 and 11 were scheduled, though 21 would be right.
    texts, _, rows = walked(device, [55, 11, NOTHING, 21], [NOTHING, NOTHING, 10, 11], [0, 1, 4], [0, 2])
    assert texts == [[55], [11, 21]]
    assert rows == [0, 1, 3, 3]


def test_the_next_request_s_root_is_no_candidate(device: str) -> None:
    """Of 10, 11 and 20 the first two were scheduled; the next request's root is a 20."""
    texts, _, _ = walked(device, [11, NOTHING, 20, 55], [NOTHING, 10, 11, 20], [0, 3, 4], [2, 0])
    assert texts == [[11, 20], [55]]


def test_a_token_that_must_not_be_accepted(device: str) -> None:
    said, tokens = [11, NOTHING, 21, NOTHING, 99, NOTHING], [NOTHING, 10, 11, 20, -1, 30]
    assert walked(device, said, tokens, [0, 6], [2])[0] == [[11, 21]]


def test_what_is_no_node_is_not_accepted(device: str) -> None:
    assert walked(device, [10] * 6, [NOTHING, *TOKENS], [0, 6], [0])[0] == [[10]]


@settings(max_examples=25, deadline=None)
@given(num_reqs=st.integers(1, 4), num_nodes=st.integers(1, 20), seed=st.integers(0, 999))
def test_as_in_torch(num_reqs: int, num_nodes: int, seed: int) -> None:
    """Random trees over four tokens, of which the target says one after every row."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(seed)
    tree = random_tree(num_reqs, num_nodes, generator)
    said = torch.randint(0, 4, (num_reqs, 1 + num_nodes), generator=generator)
    expected = walk(tree, ancestor_mask(tree, num_nodes), said, num_nodes)
    way = torch.zeros(num_reqs, num_nodes, dtype=torch.int32, device=device)
    tokens = torch.nn.functional.pad(tree.token_ids, (1, 0))
    sampled, num_sampled, _ = walk_trees(
        said.flatten().to(device),
        tokens.flatten().to(device),
        torch.arange(num_reqs + 1, device=device) * (1 + num_nodes),
        torch.arange(num_reqs, device=device),
        tree.parents.int().to(device),
        tree.is_node.to(device),
        way,
        torch.zeros_like(way),
        torch.zeros(num_reqs, dtype=torch.int32, device=device),
    )
    assert (num_sampled - 1).tolist() == expected.num_accepted.tolist()
    for request, count in enumerate(expected.num_accepted.tolist()):
        nodes = expected.nodes[request, :count]
        assert (way[request, :count] - 1).tolist() == nodes.tolist()
        own = tree.token_ids[request, nodes].tolist()
        assert sampled[request, : count + 1].tolist() == [*own, int(expected.next_token_ids[request])]


def random_tree(num_reqs: int, num_nodes: int, generator: torch.Generator) -> DraftTree:
    """Children of a node differ in their token, which the walk relies on: the ones that would not are no nodes."""
    parents, depths, tokens, is_node = (torch.zeros(num_reqs, num_nodes, dtype=torch.int64) for _ in range(4))
    for request in range(num_reqs):
        taken: set[tuple[int, int]] = set()
        for node in range(num_nodes):
            parent = int(torch.randint(-1, node, (1,), generator=generator)) if node else ROOT
            token = int(torch.randint(0, 4, (1,), generator=generator))
            parents[request, node], tokens[request, node] = parent, token
            depths[request, node] = 1 + (int(depths[request, parent]) if parent >= 0 else 0)
            is_node[request, node] = (parent, token) not in taken
            taken.add((parent, token))
    return DraftTree(tokens, parents, depths, torch.zeros(num_reqs, num_nodes), is_node.bool())
