# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Best-first draft trees of a batch in one launch, written where the next verification reads them.

The same trees as `vllm_dflash.tree.build_tree`, one node after the other (DDTree, arXiv 2604.12989): of all
continuations that extend a node by its likeliest unused child, the likeliest comes next. These are at most N + 1, so a
program keeps them in registers.

Letters: R requests, S rows of the runner's state, N nodes, D depths, C choices at each depth, W words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.triton_utils import tl, triton

from vllm_dflash.kernels.calibrate import Observations
from vllm_dflash.tree import WORD_BITS


@dataclass(frozen=True)
class TreeBuffers:
    """One tree for each row of the runner's state, without its tokens: these are the runner's draft tokens."""

    parents: torch.Tensor  # [S, N] int32; the node before, or -1: the root
    depths: torch.Tensor  # [S, N] int32; 1 right behind the root
    is_node: torch.Tensor  # [S, N] bool; False: padding
    probs: torch.Tensor  # [S, N] fp32, descending: that the target says all of a node's path; 0 for padding
    words: torch.Tensor  # [S, 1+N, W] int32; bit j of row i: row i of a verification sees row j, the root being row 0

    @classmethod
    def allocate(cls, num_state_rows: int, num_nodes: int, device: torch.device) -> TreeBuffers:
        """Without a node."""
        shape, rows = (num_state_rows, num_nodes), 1 + num_nodes
        words = torch.zeros(num_state_rows, rows, -(-rows // WORD_BITS), dtype=torch.int32, device=device)
        words[:, :, 0] = 1  # everybody sees the root, also before there has been a tree
        return cls(
            parents=torch.full(shape, -1, dtype=torch.int32, device=device),
            depths=torch.ones(shape, dtype=torch.int32, device=device),
            is_node=torch.zeros(shape, dtype=torch.bool, device=device),
            probs=torch.zeros(shape, dtype=torch.float32, device=device),
            words=words,
        )


def build_trees(
    out: TreeBuffers,
    token_ids_out: torch.Tensor,  # [R, N] int64, written: the nodes' tokens; 0 for padding
    log_probs: torch.Tensor,  # [R, D, C] fp32, descending along C; -inf: no candidate
    token_ids: torch.Tensor,  # [R, D, C] int64; no token twice at a position
    state_rows: torch.Tensor,  # [R] int64; negative: keep nothing of this tree
    as_chain: torch.Tensor,  # [S] bool: only likeliest children
    factors: torch.Tensor,  # [R, D] fp32 that the logits were calibrated with
    seen: Observations,  # its choices are overwritten
) -> None:
    """The N likeliest prefixes of each request, likeliest first. What they were chosen from is kept for `calibrate`."""
    num_reqs, num_depths, num_choices = log_probs.shape
    assert factors.shape == (num_reqs, num_depths) and factors.is_contiguous(), f"{tuple(factors.shape)}"
    assert seen.logits.shape[1:] == (num_depths, num_choices), f"{tuple(seen.logits.shape)}"
    num_nodes, num_words = out.parents.shape[1], out.words.shape[2]
    assert log_probs.is_contiguous() and token_ids.is_contiguous() and log_probs.dtype == torch.float32
    assert token_ids_out.stride(1) == 1 and token_ids_out.shape == (num_reqs, num_nodes)
    if not num_reqs:
        return
    _build_trees_kernel[(num_reqs,)](
        token_ids_out,
        out.parents,
        out.depths,
        out.is_node,
        out.probs,
        out.words,
        log_probs,
        token_ids,
        state_rows,
        as_chain,
        factors,
        seen.logits,
        seen.token_ids,
        seen.num_said,
        token_ids_out.stride(0),
        N=num_nodes,
        D=num_depths,
        C=num_choices,
        BLOCK_D=triton.next_power_of_2(num_depths),
        BLOCK_C=triton.next_power_of_2(num_choices),
        WORDS=num_words,
        BLOCK_WORDS=triton.next_power_of_2(num_words),
        WORD_BITS=WORD_BITS,
        BLOCK_N=triton.next_power_of_2(1 + num_nodes),
        num_warps=1,
    )


@triton.jit
def _build_trees_kernel(
    tokens_out_ptr,  # [R, N]
    parents_ptr,  # [S, N]
    depths_ptr,  # [S, N]
    is_node_ptr,  # [S, N]
    probs_ptr,  # [S, N]
    words_ptr,  # [S, 1+N, WORDS]
    log_probs_ptr,  # [R, D, C]
    token_ids_ptr,  # [R, D, C]
    state_rows_ptr,  # [R]
    as_chain_ptr,  # [S]
    factors_ptr,  # [R, D]
    seen_logits_ptr,  # [S, D, C]
    seen_token_ids_ptr,  # [S, D, C]
    num_said_ptr,  # [S]
    tokens_out_stride,
    N: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    WORD_BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    request = tl.program_id(0)
    state_row = tl.load(state_rows_ptr + request).to(tl.int64)
    is_kept = state_row >= 0
    state_row = tl.maximum(state_row, 0)
    is_chain = is_kept & (tl.load(as_chain_ptr + state_row) != 0)
    log_probs_ptr += request * D * C
    token_ids_ptr += request * D * C
    at_depth, of_depth = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    is_choice = (at_depth < D)[:, None] & (of_depth < C)[None, :]
    which = at_depth[:, None] * C + of_depth[None, :]
    factors = tl.load(factors_ptr + request * D + at_depth, mask=at_depth < D, other=1.0)
    logits = tl.load(log_probs_ptr + which, mask=is_choice, other=0.0) / factors[:, None]
    tl.store(seen_logits_ptr + state_row * D * C + which, logits, mask=is_choice & is_kept)
    ids = tl.load(token_ids_ptr + which, mask=is_choice, other=0).to(tl.int32)
    tl.store(seen_token_ids_ptr + state_row * D * C + which, ids, mask=is_choice & is_kept)
    tl.store(num_said_ptr + state_row, 0, mask=is_kept)

    places = tl.arange(0, BLOCK_N)
    words_of = tl.arange(0, BLOCK_WORDS)
    none = float("-inf")

    # Continuations that may come next, a place each: likelihood, what they extend, depth and which choice there.
    sums = tl.where(places == 0, tl.load(log_probs_ptr), none)
    before = tl.zeros([BLOCK_N], tl.float32)  # the sum of what they extend
    extends = tl.zeros([BLOCK_N], tl.int32) - 1
    depths = tl.zeros([BLOCK_N], tl.int32) + 1
    choices = tl.zeros([BLOCK_N], tl.int32)
    # What each row of a verification sees.
    seen = tl.where((places == 0)[:, None] & (words_of == 0)[None, :], 1, 0)
    is_word = is_kept & (words_of < WORDS)
    tl.store(words_ptr + state_row * (1 + N) * WORDS + words_of, (words_of == 0).to(tl.int32), mask=is_word)

    for node in range(0, N):
        top = tl.max(sums, axis=0)
        place = tl.min(tl.where(sums == top, places, BLOCK_N - 1), axis=0)
        is_top = places == place
        is_node = top > none
        parent = tl.where(is_node, tl.sum(tl.where(is_top, extends, 0), axis=0), -1)
        depth = tl.where(is_node, tl.sum(tl.where(is_top, depths, 0), axis=0), 1)
        choice = tl.sum(tl.where(is_top, choices, 0), axis=0)
        own_before = tl.sum(tl.where(is_top, before, 0.0), axis=0)
        token = tl.load(token_ids_ptr + (depth - 1) * C + choice, mask=is_node, other=0)

        row = node + 1
        own_bit = tl.where(words_of == row // WORD_BITS, 1 << (row % WORD_BITS), 0)
        sees = tl.sum(tl.where((places == parent + 1)[:, None], seen, 0), axis=0) | own_bit
        seen = tl.where((places == row)[:, None], sees[None, :], seen)
        tl.store(tokens_out_ptr + request * tokens_out_stride + node, token)
        tl.store(parents_ptr + state_row * N + node, parent, mask=is_kept)
        tl.store(depths_ptr + state_row * N + node, depth, mask=is_kept)
        tl.store(is_node_ptr + state_row * N + node, is_node, mask=is_kept)
        tl.store(probs_ptr + state_row * N + node, tl.exp(tl.minimum(top, 0.0)), mask=is_kept)
        row_words_ptr = words_ptr + (state_row * (1 + N) + row) * WORDS
        tl.store(row_words_ptr + words_of, sees, mask=is_word)

        # Its place goes to its next sibling, and a new one to its first child.
        has_sibling = (choice + 1 < C) & ~is_chain
        sibling = own_before + tl.load(log_probs_ptr + (depth - 1) * C + choice + 1, mask=has_sibling, other=none)
        has_child = is_node & (depth < D)
        child = top + tl.load(log_probs_ptr + depth * C, mask=has_child, other=none)
        is_new = places == row
        sums = tl.where(is_top, sibling, tl.where(is_new, child, sums))
        before = tl.where(is_new, top, before)
        extends = tl.where(is_new, node, extends)
        depths = tl.where(is_new, depth + 1, depths)
        choices = tl.where(is_top, choice + 1, choices)
