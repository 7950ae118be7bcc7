# SPDX-License-Identifier: Apache-2.0
"""Draft trees: the likeliest continuations that a block's distributions span, and a target's way through them.

A block gives a distribution for each position by itself, so a continuation's log-probability is the sum of its tokens'.
`build_tree` keeps the N prefixes with the largest sums (the best-first search of DDTree, arXiv 2604.12989, without its
heap: all requests at once, depth by depth). A prefix never sums to more than what it extends, so the N form a tree.

Every function is whole-tensor arithmetic without a host sync.

Letters: R requests, N nodes of a tree, D depths, C choices at each depth. Row 0 of a verification is the anchor, row
1 + i is node i.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

ROOT = -1  # the parent of depth 1: the anchor
WORD_BITS = 32


@dataclass(frozen=True)
class DraftTree:
    """Candidates after an anchor, likeliest first, so that a parent stands before its children."""

    token_ids: torch.Tensor  # [R, N] int64
    parents: torch.Tensor  # [R, N] int64; the node before, or ROOT
    depths: torch.Tensor  # [R, N] int64; 1 right after the anchor
    log_probs: torch.Tensor  # [R, N] fp32; summed from depth 1 on
    is_node: torch.Tensor  # [R, N] bool; False: padding, of tokens that the drafter cannot draft

    def first(self, num_nodes: int) -> DraftTree:
        """The tree of the first nodes, [R, num_nodes]: their parents are among them."""
        return DraftTree(*(column[:, :num_nodes] for column in vars(self).values()))


@dataclass(frozen=True)
class Walk:
    """What of a tree the target would have said itself."""

    nodes: torch.Tensor  # [R, D] int64; the accepted nodes from depth 1 on, then -1
    num_accepted: torch.Tensor  # [R] int64
    next_token_ids: torch.Tensor  # [R] int64; the target's own token after them


def build_tree(
    log_probs: torch.Tensor,  # [R, D, C] descending along C; -inf: no candidate
    token_ids: torch.Tensor,  # [R, D, C]; no token twice at a position
    num_nodes: int,  # N; fewer where D and C do not span as many
) -> DraftTree:
    """The N likeliest prefixes. Of equal ones a shorter comes first, then one whose own prefix came first.

    Raises ValueError where N is less than 1.
    """
    if num_nodes < 1:
        raise ValueError(f"a draft tree has at least one node, found num_nodes = {num_nodes}")
    log_probs = log_probs.float()
    num_depths, num_choices = log_probs.shape[1:]
    pairs = _pairs(num_depths, num_choices, num_nodes, log_probs.device)
    steps = log_probs.flatten(1)[:, pairs.choices]  # [R, all pairs]
    frontier = log_probs.new_zeros(log_probs.shape[0], 1)  # the sums of one depth, descending
    sums, numbers = [], []
    for start, end, before in pairs.of_depth:
        candidates = frontier[:, before] + steps[:, start:end]
        candidates, order = candidates.sort(dim=1, descending=True, stable=True)
        frontier = candidates[:, :num_nodes]
        sums.append(frontier)
        numbers.append(order[:, :num_nodes] + start)
    return _likeliest(torch.cat(sums, dim=1), torch.cat(numbers, dim=1), token_ids, pairs, num_nodes)


@dataclass(frozen=True)
class _Pairs:
    """Choice j after prefix i, for all depths, one after the other: what a candidate is, by its number."""

    of_depth: list[tuple[int, int, torch.Tensor]]  # D: first number, the one behind the last, and their prefixes
    choices: torch.Tensor  # [all pairs] into D*C
    parents: torch.Tensor  # [all pairs] among the kept ones of all depths; ROOT at depth 1
    depths: torch.Tensor  # [all pairs]


@cache
def _pairs(num_depths: int, num_choices: int, num_nodes: int, device: torch.device) -> _Pairs:
    """Those that can be among the N likeliest.

    Prefixes and choices are in descending order, so (i + 1) * (j + 1) - 1 others are at least as likely as choice j
    after prefix i.
    """
    of_depth: list[tuple[int, int, torch.Tensor]] = []
    choices: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    width, kept = 1, 0  # prefixes of the depth before, and those before them
    for depth in range(num_depths):
        of_one = [(i, j) for i in range(width) for j in range(num_choices) if (i + 1) * (j + 1) <= num_nodes]
        before = torch.tensor([i for i, _ in of_one], device=device)
        of_depth.append((len(choices), len(choices) + len(of_one), before))
        choices += [depth * num_choices + j for _, j in of_one]
        parents += [kept + i if depth else ROOT for i, _ in of_one]
        depths += [depth + 1] * len(of_one)
        kept += width if depth else 0
        width = min(len(of_one), num_nodes)
    return _Pairs(of_depth, *(torch.tensor(column, device=device) for column in (choices, parents, depths)))


def _likeliest(
    sums: torch.Tensor,  # [R, M] of all depths, one after the other
    numbers: torch.Tensor,  # [R, M] which pairs they are
    token_ids: torch.Tensor,  # [R, D, C]
    pairs: _Pairs,
    num_nodes: int,
) -> DraftTree:
    """The first N by their sums, and their parents' places among these."""
    sums, order = sums.sort(dim=1, descending=True, stable=True)
    places = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    numbers = numbers.gather(1, order[:, :num_nodes])
    parents = pairs.parents[numbers]
    parents = torch.where(parents == ROOT, ROOT, places.gather(1, parents.clamp(min=0)))
    sums = sums[:, :num_nodes]
    tokens = token_ids.flatten(1).gather(1, pairs.choices[numbers])
    return DraftTree(tokens, parents, pairs.depths[numbers], sums, sums > float("-inf"))


def chain(
    token_ids: torch.Tensor,  # [R, K]
) -> DraftTree:
    """A tree of one branch: K tokens one after the other. Its log-probabilities are zeros."""
    nodes = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(token_ids)
    zeros = torch.zeros_like(token_ids, dtype=torch.float32)
    return DraftTree(token_ids, nodes - 1, nodes + 1, zeros, torch.ones_like(token_ids, dtype=torch.bool))


@cache
def chain_mask(num_nodes: int, device: torch.device) -> torch.Tensor:
    """`ancestor_mask` of any chain of so many tokens, [1, 1+N, 1+N] bool."""
    return torch.ones(1, 1 + num_nodes, 1 + num_nodes, dtype=torch.bool, device=device).tril()


def ancestor_mask(
    tree: DraftTree,
    num_depths: int,  # D: no node is deeper
) -> torch.Tensor:
    """Which rows of a verification see which, [R, 1+N, 1+N] bool: themselves, their ancestors and the anchor."""
    num_requests, num_nodes = tree.parents.shape
    rows = torch.arange(1 + num_nodes, device=tree.parents.device)
    parent_rows = torch.cat((tree.parents.new_zeros(num_requests, 1), tree.parents + 1), dim=1)  # the anchor is its own
    mask = (rows == rows[:, None]) | (rows == parent_rows[:, :, None])  # themselves and their parents
    reach = 1
    while reach < num_depths:  # whoever sees up to n rows ahead sees, through what these see, 2n
        wide = mask.float()
        mask = (wide @ wide) > 0
        reach *= 2
    return mask


def packed_mask(
    mask: torch.Tensor,  # [..., M] bool
) -> torch.Tensor:
    """A bit for each entry, [..., ceil(M / 32)] int32: entry j is bit j % 32 of word j // 32. The kernels' format."""
    num_words = -(-mask.shape[-1] // WORD_BITS)
    padded = torch.nn.functional.pad(mask, (0, num_words * WORD_BITS - mask.shape[-1]))
    weights = 1 << torch.arange(WORD_BITS, device=mask.device)
    words = (padded.unflatten(-1, (num_words, WORD_BITS)) * weights).sum(dim=-1)
    return torch.where(words >= 1 << (WORD_BITS - 1), words - (1 << WORD_BITS), words).int()


def walk(
    tree: DraftTree,
    ancestors: torch.Tensor,  # [R, 1+N, 1+N] bool; `ancestor_mask(tree, D)`
    target_ids: torch.Tensor,  # [R, 1+N] int64; the target's token after every row
    num_depths: int,  # D
) -> Walk:
    """Follow, from the anchor on, the child that is the target's own token, as long as there is one.

    A node is on this way if it and all its ancestors are what the target says after their parents; of a depth no two
    are, since children of a node differ.
    """
    agrees = tree.is_node & (tree.token_ids == target_ids.gather(1, tree.parents + 1))  # [R, N]
    accepted = ~(ancestors[:, 1:, 1:] & ~agrees[:, None]).any(dim=2)  # [R, N]
    nodes = torch.arange(agrees.shape[1], device=agrees.device).expand_as(agrees)
    way = nodes.new_full((agrees.shape[0], num_depths + 1), -1)  # the last column takes what is not accepted
    way.scatter_(1, torch.where(accepted, tree.depths - 1, num_depths), nodes)
    num_accepted = accepted.sum(dim=1)
    last = torch.where(accepted, nodes + 1, 0).amax(dim=1, keepdim=True)  # children stand behind their parents
    return Walk(way[:, :num_depths], num_accepted, target_ids.gather(1, last)[:, 0])
