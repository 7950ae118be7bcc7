# SPDX-License-Identifier: Apache-2.0
"""Draft trees: a literal by hand, then against a heap, a search of all prefixes, and a walk token by token."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
import torch

from vllm_dflash.tree import DraftTree, ancestor_mask, build_tree, chain, chain_mask, packed_mask, walk

Prefix = tuple[int, ...]  # ranks of the chosen tokens

#: Two positions: "a" 0.6 or "b" 0.4, then "c" 0.7 or "d" 0.3. Tokens are letters' codes.
LETTERS = torch.tensor([[[97, 98], [99, 100]]])
LOG_PROBS = torch.tensor([[[0.6, 0.4], [0.7, 0.3]]]).log()


def prefixes(tree: DraftTree, request: int = 0) -> list[tuple[int, ...]]:
    """The tokens from the anchor to every node."""
    paths: list[tuple[int, ...]] = []
    for node in range(tree.token_ids.shape[1]):
        parent = int(tree.parents[request, node])
        assert parent < node, "a parent stands before its children"
        before = paths[parent] if parent >= 0 else ()
        paths.append((*before, int(tree.token_ids[request, node])))
        assert int(tree.depths[request, node]) == len(paths[-1])
    return paths


def test_best_first_by_hand() -> None:
    # a 0.6, ac 0.42, b 0.4, bc 0.28, ad 0.18, bd 0.12
    tree = build_tree(LOG_PROBS, LETTERS, 5)
    assert ["".join(map(chr, path)) for path in prefixes(tree)] == ["a", "ac", "b", "bc", "ad"]
    assert tree.parents.tolist() == [[-1, 0, -1, 2, 0]]
    torch.testing.assert_close(tree.log_probs.exp(), torch.tensor([[0.6, 0.42, 0.4, 0.28, 0.18]]))
    assert tree.is_node.all()


def test_ancestors_by_hand() -> None:
    tree = build_tree(LOG_PROBS, LETTERS, 5)
    expected = [
        [1, 0, 0, 0, 0, 0],  # the anchor
        [1, 1, 0, 0, 0, 0],  # a
        [1, 1, 1, 0, 0, 0],  # ac
        [1, 0, 0, 1, 0, 0],  # b
        [1, 0, 0, 1, 1, 0],  # bc
        [1, 1, 0, 0, 0, 1],  # ad
    ]
    assert ancestor_mask(tree, 2).int().tolist() == [expected]


@pytest.mark.parametrize(
    ("target", "path", "next_token"),
    [("x???", [], "x"), ("az??", [0], "z"), ("acq?", [0, 1], "q"), ("b??c", [2], "c"), ("cc??", [], "c")],
    ids=["none", "one", "two", "not its sibling's child", "not a grandchild"],
)
def test_walks_by_hand(target: str, path: list[int], next_token: str) -> None:
    """The tree "a", "ac", "b"; `target` is what the target says after the anchor, "a", "ac" and "b"."""
    tree = build_tree(LOG_PROBS, LETTERS, 3)
    got = walk(tree, ancestor_mask(tree, 2), torch.tensor([[ord(letter) for letter in target]]), 2)
    assert got.nodes.tolist() == [path + [-1] * (2 - len(path))]
    assert got.num_accepted.tolist() == [len(path)]
    assert chr(int(got.next_token_ids)) == next_token


def test_padding_is_never_walked_on() -> None:
    """A position of one choice and another that the drafter knows nothing of: one node, and padding."""
    log_probs = torch.tensor([[[0.0, -math.inf], [-math.inf, -math.inf]]])
    tree = build_tree(log_probs, LETTERS, 4)
    assert tree.is_node.tolist() == [[True, False, False, False]]
    got = walk(tree, ancestor_mask(tree, 2), torch.tensor([[98] * 5]), 2)  # "b" has no probability
    assert got.num_accepted.tolist() == [0] and got.next_token_ids.tolist() == [98]


def test_certain_tokens_tie_with_what_they_extend() -> None:
    """Probability 1 at every position: each prefix sums to zero, and the chain must come out in order."""
    log_probs = torch.zeros(1, 4, 1)
    tree = build_tree(log_probs, torch.tensor([[[5], [6], [7], [8]]]), 3)
    assert prefixes(tree) == [(5,), (5, 6), (5, 6, 7)]


def test_a_chain_is_a_tree() -> None:
    tree = chain(torch.tensor([[7, 8, 9]]))
    assert prefixes(tree) == [(7,), (7, 8), (7, 8, 9)]
    assert torch.equal(ancestor_mask(tree, 3)[0], torch.ones(4, 4, dtype=torch.bool).tril())
    got = walk(tree, ancestor_mask(tree, 3), torch.tensor([[7, 8, 5, 9]]), 3)
    assert got.num_accepted.tolist() == [2] and got.next_token_ids.tolist() == [5]


# Any distributions.


def heap_search(log_probs: Sequence[Sequence[float]], num_nodes: int) -> list[Prefix]:
    """The published search, literally: take the best prefix, add its next sibling and its first child."""
    queue = [(-log_probs[0][0], (0,))]
    found: list[Prefix] = []
    while queue and len(found) < num_nodes:
        negative, prefix = heapq.heappop(queue)
        found.append(prefix)
        depth, rank = len(prefix) - 1, prefix[-1]
        if rank + 1 < len(log_probs[depth]):
            sibling = negative + log_probs[depth][rank] - log_probs[depth][rank + 1]
            heapq.heappush(queue, (sibling, (*prefix[:-1], rank + 1)))
        if depth + 1 < len(log_probs):
            heapq.heappush(queue, (negative - log_probs[depth + 1][0], (*prefix, 0)))
    return found


def total(log_probs: Sequence[Sequence[float]], prefix: Prefix) -> float:
    return sum(log_probs[depth][rank] for depth, rank in enumerate(prefix))


@st.composite
def distributions(draw: st.DrawFn) -> list[list[list[float]]]:
    """Log-probabilities of 1-3 requests, D of 1-4 and C of 1-4, each descending; often equal ones."""
    requests, depths, choices = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    weight = st.one_of(st.integers(1, 4).map(float), st.floats(0.05, 9.0))
    log_probs = []
    for _ in range(requests):
        rows = [sorted((draw(weight) for _ in range(choices)), reverse=True) for _ in range(depths)]
        log_probs.append([[math.log(w / (sum(row) + 0.5)) for w in row] for row in rows])
    return log_probs


@settings(max_examples=150, deadline=None)
@given(distributions(), st.integers(1, 20))
def test_the_likeliest_prefixes(log_probs: list[list[list[float]]], num_nodes: int) -> None:
    depths, choices = len(log_probs[0]), len(log_probs[0][0])
    ids = torch.arange(choices).expand(len(log_probs), depths, choices)  # a token is its rank
    tree = build_tree(torch.tensor(log_probs), ids, num_nodes)
    for request, own in enumerate(log_probs):
        found = prefixes(tree, request)
        assert len(set(found)) == len(found)
        every = [p for d in range(1, depths + 1) for p in itertools.product(range(choices), repeat=d)]
        best = sorted((total(own, prefix) for prefix in every), reverse=True)[:num_nodes]
        sums = [total(own, prefix) for prefix in found]
        assert sums == pytest.approx(best, abs=1e-5)
        assert tree.log_probs[request].tolist() == pytest.approx(sums, abs=1e-5)
        assert sorted(total(own, p) for p in heap_search(own, num_nodes)) == pytest.approx(sorted(sums), abs=1e-5)


def literal_walk(tree: DraftTree, request: int, target_ids: list[int]) -> tuple[list[int], int]:
    """Node by node, in plain Python."""
    path: list[int] = []
    while True:
        wanted = target_ids[path[-1] + 1 if path else 0]
        here = path[-1] if path else -1
        nodes = range(tree.token_ids.shape[1])
        children = [n for n in nodes if int(tree.parents[request, n]) == here and bool(tree.is_node[request, n])]
        match = [n for n in children if int(tree.token_ids[request, n]) == wanted]
        if not match:
            return path, wanted
        path += match


@settings(max_examples=150, deadline=None)
@given(distributions(), st.integers(1, 12), st.data())
def test_any_walk(log_probs: list[list[list[float]]], num_nodes: int, data: st.DataObject) -> None:
    depths, choices = len(log_probs[0]), len(log_probs[0][0])
    ids = torch.arange(choices).expand(len(log_probs), depths, choices)
    tree = build_tree(torch.tensor(log_probs), ids, num_nodes)
    rows = tree.token_ids.shape[1] + 1
    target = [data.draw(st.lists(st.integers(0, choices), min_size=rows, max_size=rows)) for _ in log_probs]
    got = walk(tree, ancestor_mask(tree, depths), torch.tensor(target), depths)
    for request, own in enumerate(target):
        path, next_token = literal_walk(tree, request, own)
        assert got.nodes[request].tolist() == path + [-1] * (depths - len(path))
        assert got.num_accepted[request] == len(path) and got.next_token_ids[request] == next_token


@settings(max_examples=60, deadline=None)
@given(distributions(), st.integers(1, 12))
def test_any_ancestors(log_probs: list[list[list[float]]], num_nodes: int) -> None:
    depths, choices = len(log_probs[0]), len(log_probs[0][0])
    ids = torch.arange(choices).expand(len(log_probs), depths, choices)
    tree = build_tree(torch.tensor(log_probs), ids, num_nodes)
    mask = ancestor_mask(tree, depths)
    for request in range(len(log_probs)):
        paths = [(), *prefixes(tree, request)]
        for row, path in enumerate(paths):
            assert mask[request, row].tolist() == [other == path[: len(other)] for other in paths]


@pytest.mark.parametrize("num_nodes", [1, 4])
def test_the_mask_of_a_chain(num_nodes: int) -> None:
    tree = chain(torch.zeros(1, num_nodes, dtype=torch.long))
    assert torch.equal(chain_mask(num_nodes, torch.device("cpu")), ancestor_mask(tree, num_nodes))


def test_the_first_nodes_are_the_smaller_tree() -> None:
    log_probs = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0)).log_softmax(dim=-1)
    log_probs, token_ids = log_probs.sort(dim=-1, descending=True)
    large, small = build_tree(log_probs, token_ids, 20), build_tree(log_probs, token_ids, 7)
    for name, column in vars(large.first(7)).items():
        assert torch.equal(column, getattr(small, name)), name


# Packing.


def test_bits_by_hand() -> None:
    mask = torch.zeros(2, 34, dtype=torch.bool)
    mask[0, [0, 2, 33]] = True
    mask[1, 31] = True
    assert packed_mask(mask).tolist() == [[5, 2], [-(2**31), 0]]


@given(st.lists(st.booleans(), min_size=1, max_size=140))
def test_every_bit_comes_back(bits: list[bool]) -> None:
    words = packed_mask(torch.tensor(bits)).tolist()
    assert len(words) == math.ceil(len(bits) / 32)
    assert [bool(words[place // 32] >> (place % 32) & 1) for place in range(len(bits))] == bits
