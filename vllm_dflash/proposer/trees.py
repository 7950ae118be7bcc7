# SPDX-License-Identifier: Apache-2.0
"""Logits of a block -> a draft tree for each request, of the same number of nodes each.

Letters: R requests, K depths, V vocabulary, N nodes.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from vllm_dflash.tree import ROOT, DraftTree, build_tree, chain


def drafted_trees(
    logits: torch.Tensor,  # [R, K, V]; -inf: cannot be drafted
    temperature: torch.Tensor,  # [R] the requests' own; 0: as at 1, since every candidate may be the target's likeliest
    as_chain: torch.Tensor,  # [R] bool
    num_nodes: int,  # N <= V
) -> DraftTree:
    """The likeliest N continuations, or where it has to be a chain, the likeliest token at each depth."""
    logits = logits.float() / torch.where(temperature == 0, 1.0, temperature)[:, None, None]
    choices, token_ids = logits.topk(num_nodes, dim=-1)
    trees = build_tree(choices - logits.logsumexp(dim=-1, keepdim=True), token_ids, num_nodes)
    chains = padded_chain(token_ids[:, :, 0], num_nodes)
    pairs = zip(vars(chains).values(), vars(trees).values(), strict=True)
    return DraftTree(*(torch.where(as_chain[:, None], of_chain, of_tree) for of_chain, of_tree in pairs))


def padded_chain(
    token_ids: torch.Tensor,  # [R, K]
    num_nodes: int,  # N
) -> DraftTree:
    """A tree of one branch, cut to N nodes or filled up with what is no node. Its log-probabilities are zeros."""
    line = chain(token_ids[:, :num_nodes])
    missing = (0, num_nodes - line.token_ids.shape[1])
    return DraftTree(
        token_ids=pad(line.token_ids, missing, value=0),
        parents=pad(line.parents, missing, value=ROOT),
        depths=pad(line.depths, missing, value=1),
        log_probs=pad(line.log_probs, missing, value=0.0),
        is_node=pad(line.is_node, missing, value=False),
    )


def empty_trees(num_requests: int, num_nodes: int, device: torch.device) -> DraftTree:
    """Trees [num_requests, num_nodes] without a node."""
    return padded_chain(torch.zeros(num_requests, 0, dtype=torch.int64, device=device), num_nodes)
