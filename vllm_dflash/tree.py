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


@dataclass(frozen=True)
class DraftTree:
    """Candidates after an anchor, likeliest first, so that a parent stands before its children."""

    token_ids: torch.Tensor  # [R, N] int64
    parents: torch.Tensor  # [R, N] int64; the node before, or ROOT
    depths: torch.Tensor  # [R, N] int64; 1 right after the anchor
    log_probs: torch.Tensor  # [R, N] fp32; summed from depth 1 on
    is_node: torch.Tensor  # [R, N] bool; False: padding, of tokens that the drafter cannot draft


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
    num_requests, num_depths, num_choices = log_probs.shape
    scores, parents, tokens, depths = [], [], [], []
    frontier = log_probs.new_zeros(num_requests, 1)  # the sums of one depth, descending
    start, total = 0, 0  # candidates before the depth above, and so far
    for depth in range(num_depths):
        before, choice = _pairs(frontier.shape[1], num_choices, num_nodes, log_probs.device)
        sums = frontier[:, before] + log_probs[:, depth, choice]
        sums, order = sums.sort(dim=1, descending=True, stable=True)
        frontier, order = sums[:, :num_nodes], order[:, :num_nodes]
        scores.append(frontier)
        parents.append(before[order] + start if depth else torch.full_like(order, ROOT))
        tokens.append(token_ids[:, depth].gather(1, choice[order]))
        depths.append(torch.full_like(order, depth + 1))
        start, total = total, total + frontier.shape[1]
    return _likeliest(
        torch.cat(scores, dim=1),
        torch.cat(parents, dim=1),
        torch.cat(tokens, dim=1),
        torch.cat(depths, dim=1),
        num_nodes,
    )


@cache
def _pairs(
    num_before: int, num_choices: int, num_nodes: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which choices after which prefixes can be among the N likeliest: indices of both, int64 each.

    Both are in descending order, so (i + 1) * (j + 1) - 1 others are at least as likely as choice j after prefix i.
    """
    pairs = [(i, j) for i in range(num_before) for j in range(num_choices) if (i + 1) * (j + 1) <= num_nodes]
    before, choice = torch.tensor(pairs, dtype=torch.int64, device=device).unbind(1)
    return before, choice


def _likeliest(
    scores: torch.Tensor,  # [R, M] of all depths, one after the other
    parents: torch.Tensor,  # [R, M] indices among M
    token_ids: torch.Tensor,  # [R, M]
    depths: torch.Tensor,  # [R, M]
    num_nodes: int,
) -> DraftTree:
    """The first N by score, and their parents' numbers among these."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    numbers = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, numbers)
    order = order[:, :num_nodes]
    parents = parents.gather(1, order)
    parents = torch.where(parents == ROOT, ROOT, rank.gather(1, parents.clamp(min=0)))
    scores = scores.gather(1, order)
    return DraftTree(token_ids.gather(1, order), parents, depths.gather(1, order), scores, scores > float("-inf"))


def chain(
    token_ids: torch.Tensor,  # [R, K]
) -> DraftTree:
    """A tree of one branch: K tokens one after the other. Its log-probabilities are zeros."""
    nodes = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(token_ids)
    zeros = torch.zeros_like(token_ids, dtype=torch.float32)
    return DraftTree(token_ids, nodes - 1, nodes + 1, zeros, torch.ones_like(token_ids, dtype=torch.bool))


def ancestor_mask(
    tree: DraftTree,
    num_depths: int,  # D: no node is deeper
) -> torch.Tensor:
    """Which rows of a verification see which, [R, 1+N, 1+N] bool: themselves, their ancestors and the anchor."""
    num_requests, num_nodes = tree.parents.shape
    rows = torch.arange(1 + num_nodes, device=tree.parents.device).expand(num_requests, -1)
    parent_rows = torch.cat((torch.zeros_like(rows[:, :1]), tree.parents + 1), dim=1)  # the anchor is its own
    mask = torch.zeros(num_requests, 1 + num_nodes, 1 + num_nodes, dtype=torch.bool, device=rows.device)
    for _ in range(1 + num_depths):
        mask.scatter_(2, rows[:, :, None], True)
        rows = parent_rows.gather(1, rows)
    return mask


def walk(
    tree: DraftTree,
    target_ids: torch.Tensor,  # [R, 1+N] int64; the target's token after every row
    num_depths: int,  # D
) -> Walk:
    """Follow, from the anchor on, the child that is the target's own token, as long as there is one."""
    row = torch.zeros_like(target_ids[:, :1])  # [R, 1] where each request stands
    wanted = target_ids[:, :1]
    nodes, walking = [], torch.ones_like(row, dtype=torch.bool)
    for _ in range(num_depths):
        match = tree.is_node & (tree.parents == row - 1) & (tree.token_ids == wanted) & walking  # [R, N]
        walking = match.any(dim=1, keepdim=True)
        node = match.to(torch.uint8).argmax(dim=1, keepdim=True)
        nodes.append(torch.where(walking, node, -1))
        row = torch.where(walking, node + 1, row)
        wanted = target_ids.gather(1, row)
    path = torch.cat(nodes, dim=1) if nodes else row.new_empty(row.shape[0], 0)
    return Walk(path, (path >= 0).sum(dim=1), wanted[:, 0])
