# SPDX-License-Identifier: Apache-2.0
"""Draft trees in one launch: against the best-first search in plain torch, and one tree written out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dflash.kernels.calibrate import Observations
from vllm_dflash.kernels.tree_build import TreeBuffers, build_trees
from vllm_dflash.tree import ROOT, ancestor_mask, build_tree, packed_mask

NOT_WRITTEN = -9


def build(
    log_probs: torch.Tensor, token_ids: torch.Tensor, num_nodes: int, state_rows: list[int], as_chain: list[bool]
) -> tuple[TreeBuffers, torch.Tensor]:
    """Trees in rows of a state, and the tokens."""
    device = log_probs.device
    out = TreeBuffers.allocate(len(as_chain), num_nodes, device)
    out.parents.fill_(NOT_WRITTEN)
    tokens = torch.full((len(log_probs), num_nodes), NOT_WRITTEN, dtype=torch.int64, device=device)
    rows = torch.tensor(state_rows, device=device)
    factors = 0.5 + torch.arange(log_probs.shape[0] * log_probs.shape[1], device=device).view(log_probs.shape[:2])
    seen = Observations.allocate(len(as_chain), *log_probs.shape[1:], log_probs.device)
    seen.num_said.fill_(3)
    chains = torch.tensor(as_chain, device=device)
    build_trees(out, tokens, log_probs.contiguous(), token_ids, rows, chains, factors, seen)
    kept = [(row, request) for request, row in enumerate(state_rows) if row >= 0]
    for row, request in kept:
        torch.testing.assert_close(seen.logits[row], log_probs[request] / factors[request, :, None])
        assert torch.equal(seen.token_ids[row].long(), token_ids[request])
    learned = {row for row, _ in kept}
    assert [count == 0 for count in seen.num_said.tolist()] == [row in learned for row in range(len(as_chain))]
    return out, tokens


def choices(num_reqs: int, num_depths: int, num_choices: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, descending, and tokens, no two alike at a position."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_reqs, num_depths, num_choices + 5, generator=generator)
    return logits.log_softmax(dim=-1).topk(num_choices, dim=-1)


@settings(max_examples=25, deadline=None)
@given(
    num_reqs=st.integers(1, 3),
    num_depths=st.integers(1, 6),
    num_choices=st.integers(1, 9),
    num_nodes=st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_as_in_torch(num_reqs: int, num_depths: int, num_choices: int, num_nodes: int, seed: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    log_probs, token_ids = (given.to(device) for given in choices(num_reqs, num_depths, num_choices, seed))
    rows = [2 + request for request in range(num_reqs)]
    out, tokens = build(log_probs, token_ids, num_nodes, rows, [False] * 6)
    expected = build_tree(log_probs, token_ids, num_nodes)
    count = expected.token_ids.shape[1]  # fewer than N where depths and choices do not span as many
    assert tokens[:, :count].tolist() == expected.token_ids.tolist()
    assert out.parents[rows, :count].tolist() == expected.parents.tolist()
    assert out.depths[rows, :count].tolist() == expected.depths.tolist()
    torch.testing.assert_close(out.probs[rows, :count], expected.log_probs.exp())
    words = packed_mask(ancestor_mask(expected, num_depths))
    assert out.words[rows, : 1 + count, : words.shape[2]].tolist() == words.tolist()
    assert out.is_node[rows].sum(dim=1).tolist() == [count] * num_reqs
    assert not tokens[:, count:].any() and not out.probs[rows, count:].any()
    assert (out.parents[[0, 1, 5]] == NOT_WRITTEN).all(), "another's row"


def test_by_hand(device: str) -> None:
    """docs/trees.md's example, and the same as a chain."""
    probs = torch.tensor([[[0.8, 0.1], [0.7, 0.2], [0.5, 0.3]]] * 2, device=device)
    tokens = torch.tensor([[[1, 2], [3, 4], [5, 6]]] * 2, device=device)
    out, drafted = build(probs.log(), tokens, 5, [0, 1], [False, True])
    assert drafted.tolist() == [[1, 3, 5, 6, 4], [1, 3, 5, 0, 0]]
    assert out.parents.tolist() == [[ROOT, 0, 1, 1, 0], [ROOT, 0, 1, ROOT, ROOT]]
    assert out.depths.tolist() == [[1, 2, 3, 3, 2], [1, 2, 3, 1, 1]]
    assert out.is_node.tolist() == [[True] * 5, [True, True, True, False, False]]
    assert out.probs[0].tolist() == pytest.approx([0.8, 0.56, 0.28, 0.168, 0.16])
    assert out.words[0, :, 0].tolist() == [0b1, 0b11, 0b111, 0b1111, 0b10111, 0b100011]


def test_what_cannot_be_drafted_is_no_node(device: str) -> None:
    none = float("-inf")
    log_probs = torch.tensor([[[-0.5, -1.0, none], [none, none, none]]], device=device)
    out, drafted = build(log_probs, torch.tensor([[[4, 1, 2], [7, 8, 9]]], device=device), 4, [0], [False])
    assert drafted.tolist() == [[4, 1, 0, 0]]
    assert out.is_node.tolist() == [[True, True, False, False]]
    assert out.depths.tolist() == [[1, 1, 1, 1]]


def test_likelihoods_are_at_most_one(device: str) -> None:
    """Rounding may make a log-probability positive."""
    out, _ = build(
        torch.full((1, 3, 1), 1e-6, device=device), torch.zeros(1, 3, 1, device=device).long(), 3, [0], [False]
    )
    assert out.probs.tolist() == [[1.0] * 3]


def test_before_there_is_a_tree_the_root_sees_itself(device: str) -> None:
    """A request may be given rows for candidates that nobody has drafted yet."""
    assert (TreeBuffers.allocate(2, 40, torch.device(device)).words[:, 0] == torch.tensor([1, 0], device=device)).all()


def test_nobodys_tree_is_not_kept(device: str) -> None:
    log_probs, token_ids = (given.to(device) for given in choices(2, 3, 4, seed=5))
    out, tokens = build(log_probs, token_ids, 6, [-1, 0], [False])
    expected = build_tree(log_probs, token_ids, 6)
    assert tokens.tolist() == expected.token_ids.tolist()
    assert out.parents.tolist() == expected.parents[1:].tolist()


def test_the_widest_tree(device: str) -> None:
    """Four words of ancestors."""
    log_probs, token_ids = (given.to(device) for given in choices(1, 15, 127, seed=8))
    out, tokens = build(log_probs, token_ids, 127, [0], [False])
    expected = build_tree(log_probs, token_ids, 127)
    assert tokens.tolist() == expected.token_ids.tolist()
    assert out.words.tolist() == packed_mask(ancestor_mask(expected, 15)).tolist()
