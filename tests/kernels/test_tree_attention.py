# SPDX-License-Identifier: Apache-2.0
"""Attention of a tree's rows: against one softmax over prefix and tree in plain torch, and against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dflash.kernels.tree_attention import (
    Tile,
    choose_tile,
    merge_tree_attention,
    reference_merge_tree_attention,
)
from vllm_dflash.tree import DraftTree, ancestor_mask, packed_mask


def random_masks(num_requests: int, num_nodes: int, seed: int) -> torch.Tensor:
    """Of random trees, [R, 1+N, 1+N] bool."""
    generator = torch.Generator().manual_seed(seed)
    parents = torch.zeros(num_requests, num_nodes, dtype=torch.int64)
    for node in range(num_nodes):
        parents[:, node] = torch.randint(-1, node, (num_requests,), generator=generator) if node else -1
    zeros = torch.zeros_like(parents)
    tree = DraftTree(zeros, parents, zeros, zeros.float(), torch.ones_like(parents, dtype=torch.bool))
    return ancestor_mask(tree, num_nodes)


class Step:
    """Rows of trees one after the other, a gap before each, in memory whose other rows are NaN."""

    def __init__(self, num_rows: list[int], heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: str):
        torch.manual_seed(len(num_rows) + head_dim)
        gap = 2
        starts = [gap + sum(num_rows[:index]) + gap * index for index in range(len(num_rows))]
        self.num_tokens = starts[-1] + num_rows[-1] + gap
        self.is_row = torch.zeros(self.num_tokens, dtype=torch.bool, device=device)
        for start, count in zip(starts, num_rows, strict=True):
            self.is_row[start : start + count] = True
        self.first_rows = torch.tensor(starts, dtype=torch.int32, device=device)
        self.num_rows = torch.tensor(num_rows, dtype=torch.int32, device=device)
        self.query = self.rows(heads[0], head_dim, dtype, device)
        self.key, self.value = (self.rows(heads[1], head_dim, dtype, device) for _ in range(2))
        self.prefix_keys, self.prefix_values = (
            torch.randn(7, heads[1], head_dim, device=device).to(dtype) for _ in range(2)
        )
        self.group, self.scale = heads[0] // heads[1], head_dim**-0.5
        self.sinks: torch.Tensor | None = None

    def rows(self, heads: int, head_dim: int, dtype: torch.dtype, device: str) -> torch.Tensor:
        wide = torch.randn(self.num_tokens, heads, head_dim + 8, device=device)  # as views of a fused projection are
        wide[~self.is_row] = math.nan
        return wide.to(dtype)[:, :, :head_dim]

    def prefix(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over the prefix alone, [T, heads, D] and [heads, T]."""
        scores = self.scores(self.query, self.prefix_keys)
        values = self.prefix_values.float().repeat_interleave(self.group, dim=1)
        return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), values).to(dtype), scores.logsumexp(dim=-1)

    def scores(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        keys = keys.float().repeat_interleave(self.group, dim=1)
        return torch.einsum("qhd,khd->hqk", query.float(), keys) * self.scale

    def whole(self, request: int, ancestors: torch.Tensor) -> torch.Tensor:
        """One request's attention over prefix and tree in one softmax, [rows, heads, D] fp32."""
        first, count = int(self.first_rows[request]), int(self.num_rows[request])
        rows = slice(first, first + count)
        sees = torch.nn.functional.pad(ancestors[request, :count, :count], (len(self.prefix_keys), 0), value=True)
        keys, values = (
            torch.cat((prefix, own[rows]))
            for prefix, own in ((self.prefix_keys, self.key), (self.prefix_values, self.value))
        )
        scores = self.scores(self.query[rows], keys).masked_fill(~sees, float("-inf"))
        values = values.float().repeat_interleave(self.group, dim=1)
        return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), values)

    def merge(
        self,
        out: torch.Tensor,
        lse: torch.Tensor,
        ancestors: torch.Tensor,
        max_rows: int | None = None,
        tile: Tile | None = None,
    ) -> None:
        # Of a state whose rows are in another order, with one of nobody's among them.
        order = list(range(len(ancestors)))[::-1]
        words = torch.full((1 + len(order), *packed_mask(ancestors).shape[1:]), -1, dtype=torch.int32)
        words = words.to(ancestors.device)
        words[order] = packed_mask(ancestors)
        state_rows = torch.tensor(order, dtype=torch.int32, device=ancestors.device)
        rows = (state_rows, self.first_rows, self.num_rows)
        merge_tree_attention(
            out, lse, self.query, self.key, self.value, words, *rows, self.scale, max_rows, tile, self.sinks
        )


def check(step: Step, ancestors: torch.Tensor, dtype: torch.dtype, tile: Tile | None = None) -> None:
    out, lse = step.prefix(dtype)
    before = out.clone()
    step.merge(out, lse, ancestors, tile=tile)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for request, count in enumerate(step.num_rows.tolist()):
        first = int(step.first_rows[request])
        torch.testing.assert_close(out[first : first + count].float(), step.whole(request, ancestors), **tolerance)
    torch.testing.assert_close(out[~step.is_row], before[~step.is_row], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("num_rows", "num_nodes", "heads", "head_dim"),
    [([4], 3, (1, 1), 32), ([16, 0, 9], 15, (6, 2), 32), ([128, 33], 127, (4, 1), 64), ([32] * 3, 31, (8, 8), 96)],
)
def test_as_one_softmax(
    device: str, num_rows: list[int], num_nodes: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    """Trees of several words, cut ones, requests without any, heads in groups, sizes that are no power of two."""
    step = Step(num_rows, heads, head_dim, dtype, device)
    check(step, random_masks(len(num_rows), num_nodes, seed=1).to(device), dtype)


@pytest.mark.parametrize("max_rows", [9, 500])
def test_a_bound_of_rows(device: str, max_rows: int) -> None:
    """Fewer programs where trees are known to be cut, and no more than whole ones where they are not."""
    step = Step([9, 3], (2, 1), 32, torch.float32, device)
    ancestors = random_masks(2, 39, seed=2).to(device)
    out, lse = step.prefix(torch.float32)
    step.merge(out, lse, ancestors, max_rows)
    for request, (first, count) in enumerate(zip(step.first_rows.tolist(), step.num_rows.tolist(), strict=True)):
        whole = step.whole(request, ancestors)
        torch.testing.assert_close(out[first : first + count], whole, rtol=1e-5, atol=1e-5)


def test_tiles() -> None:
    """Few requests are cut small; many are not, nor larger than what there is of them."""
    assert choose_tile(1, 8, 128, 32) == Tile(16, 32)
    assert choose_tile(1, 8, 256, 64) == Tile(16, 64)
    assert choose_tile(32, 8, 128, 32) == Tile(64)
    assert choose_tile(64, 8, 32, 8) == Tile(32, num_warps=2)
    assert choose_tile(1, 8, 128, 32, is_gpu=False) == Tile(64)


@pytest.mark.parametrize("tile", [Tile(16, 64), Tile(32, num_warps=2), Tile(64)])
def test_any_tile(device: str, tile: Tile) -> None:
    step = Step([40, 0, 9], (6, 2), 32, torch.float32, device)
    check(step, random_masks(3, 39, seed=6).to(device), torch.float32, tile)


@settings(max_examples=20, deadline=None)
@given(
    num_rows=st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(lambda counts: counts[-1] > 0),
    group=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_random_trees(num_rows: list[int], group: int, seed: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step = Step(num_rows, (2 * group, 2), 16, torch.float32, device)
    ancestors = random_masks(len(num_rows), 39, seed).to(device)
    check(step, ancestors, torch.float32)
    out, lse = step.prefix(torch.float32)
    expected = out.clone()
    step.merge(out, lse, ancestors)
    reference_merge_tree_attention(
        expected, lse, step.query, step.key, step.value, ancestors, step.first_rows, step.num_rows, step.scale
    )
    torch.testing.assert_close(out[step.is_row], expected[step.is_row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("nothing", [float("inf"), float("-inf")])
@pytest.mark.parametrize("sinks", [None, [0.5, -1.0]], ids=["no sinks", "sinks"])
def test_no_prefix(device: str, nothing: float, sinks: list[float] | None) -> None:
    """An attention kernel without keys leaves anything in its output, and an infinite log-sum-exp of either sign.

    A sink is then still seen: its share goes to no value.
    """
    step = Step([5], (2, 1), 16, torch.float32, device)
    ancestors = random_masks(1, 4, seed=3).to(device)
    step.prefix_keys, step.prefix_values = step.prefix_keys[:0], step.prefix_values[:0]
    out = torch.full_like(step.query, math.nan)
    wanted = step.whole(0, ancestors)
    step.sinks = None if sinks is None else torch.tensor(sinks, device=device)
    if step.sinks is not None:
        scores = step.scores(step.query[step.is_row], step.key[step.is_row])  # [heads, rows, keys]
        in_tree = scores.masked_fill(~ancestors[0], float("-inf")).exp().sum(dim=2)
        wanted = wanted * (in_tree / (in_tree + step.sinks.exp()[:, None])).t()[:, :, None]
    step.merge(out, torch.full((2, step.num_tokens), nothing, device=device), ancestors)
    torch.testing.assert_close(out[step.is_row], wanted, rtol=1e-5, atol=1e-5)


def test_by_hand(device: str) -> None:
    """A root and two children of it: each child sees the root, itself and not its sibling. All keys score alike."""
    step = Step([3], (1, 1), 16, torch.float32, device)
    step.query = torch.zeros_like(step.query)
    step.value[step.is_row] = torch.tensor([2.0, 4.0, 8.0], device=device)[:, None, None]
    out = torch.ones_like(step.query)
    ancestors = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], device=device).bool()
    step.merge(out, torch.zeros(1, step.num_tokens, device=device), ancestors)  # a prefix of one key, whose value is 1
    assert out[step.is_row][:, 0, 0].tolist() == pytest.approx([3 / 2, 7 / 3, 11 / 3])
