# SPDX-License-Identifier: Apache-2.0
"""Attention of trees in layers with a window: against one softmax in plain torch over texts written out row by row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_tree_attention import random_masks
from vllm_dflash.kernels.tree_rows import VerifiedRows
from vllm_dflash.kernels.window_tree_attention import _BLOCK_KEYS as BLOCK_KEYS
from vllm_dflash.kernels.window_tree_attention import window_tree_attention
from vllm_dflash.tree import packed_mask

BLOCK_SIZE = 16


class Step:
    """Requests with prefixes in a paged cache, whose unused slots are NaN, and trees behind them; then padding."""

    def __init__(
        self,
        prefix_lens: list[int],
        num_rows: list[int],  # 0: one row without candidates, the prefix's last
        heads: tuple[int, int],
        head_dim: int,
        dtype: torch.dtype,
        device: str,
        sinks: bool,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.heads, self.scale, self.device = heads, head_dim**-0.5, device
        self.prefix_lens, self.num_rows = prefix_lens, num_rows
        counts = [max(count, 1) for count in num_rows]
        self.starts = [1 + sum(counts[:index]) for index in range(len(counts))]  # row 0 is another's
        self.ancestors = random_masks(len(counts), max(1, *(count - 1 for count in counts)), seed)
        self.query, self.key, self.value = (
            torch.randn(1 + sum(counts), number, head_dim, device=device).to(dtype)
            for number in (heads[0], *heads[1:] * 2)
        )
        self.sinks = torch.randn(heads[0], device=device).to(dtype) if sinks else None
        self.blocks = math.ceil(max(prefix_lens) / BLOCK_SIZE)
        self.table = (torch.randperm(len(counts) * self.blocks) + 1).view(len(counts), -1).int().to(device)
        cache = torch.full((1 + len(counts) * self.blocks, BLOCK_SIZE, heads[1], 2 * head_dim), math.nan)
        self.cache = cache.to(dtype).to(device).transpose(1, 2)
        self.prefixes = [torch.randn(length, heads[1], 2 * head_dim, device=device).to(dtype) for length in prefix_lens]
        for request, states in enumerate(self.prefixes):
            slots = torch.arange(len(states), device=device)
            self.cache[self.table[request, slots // BLOCK_SIZE].long(), :, slots % BLOCK_SIZE] = states
        padding = [0]
        self.verified = VerifiedRows.allocate(len(counts) + 1, len(self.query), torch.device(device))
        for name, values in (
            ("state_rows", [*range(len(counts))][::-1] + padding),
            ("first_rows", self.starts + padding),
            ("num_rows", num_rows + padding),
            ("prefix_lens", prefix_lens + padding),
        ):
            getattr(self.verified, name).copy_(torch.tensor(values))
        for request, start in enumerate(self.starts):
            depths = self.ancestors[request, : counts[request], : counts[request]].sum(dim=1) - 1
            root = prefix_lens[request] - (num_rows[request] == 0)
            self.verified.positions[start : start + counts[request]] = (root + depths).to(device)

    def run(self, window: int) -> torch.Tensor:
        out = torch.full_like(self.query, -7.0)
        words = packed_mask(self.ancestors.flip(0)).to(self.device)
        window_tree_attention(
            out, self.query, self.key, self.value, self.cache, self.table, words, self.verified,
            len(self.num_rows) + 1, self.scale, window, self.sinks,
        )  # fmt: skip
        assert (out[0] == -7).all(), "another's row"
        return out

    def expected(self, request: int, window: int) -> torch.Tensor:
        """[rows, heads, D] fp32: every row over its own text, from the first token to itself."""
        start, count = self.starts[request], self.num_rows[request]
        keys, values = self.prefixes[request].float().chunk(2, dim=-1)
        places = torch.arange(len(keys), device=self.device)
        rows = []
        for row in range(max(count, 1)):
            way = self.ancestors[request, row, :count].nonzero().flatten().to(self.device) + start
            text_keys = torch.cat((keys, self.key[way].float()))
            text_values = torch.cat((values, self.value[way].float()))
            at = torch.cat((places, self.verified.positions[way]))
            is_near = self.verified.positions[start + row] - at < window
            group = self.heads[0] // self.heads[1]
            scores = torch.einsum(
                "hd,khd->hk", self.query[start + row].float(), text_keys.repeat_interleave(group, dim=1)
            )
            scores = (scores * self.scale).masked_fill(~is_near, float("-inf"))
            if self.sinks is not None:
                scores = torch.cat((scores, self.sinks.float()[:, None]), dim=1)
            weights = scores.softmax(dim=1)[:, : len(at)]
            rows.append(torch.einsum("hk,khd->hd", weights, text_values.repeat_interleave(group, dim=1)))
        return torch.stack(rows)


def check(step: Step, window: int, tolerance: float) -> None:
    out = step.run(window)
    for request, start in enumerate(step.starts):
        wanted = step.expected(request, window)
        torch.testing.assert_close(out[start : start + len(wanted)].float(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("window", [3, 20, 1000], ids=["shorter than a tree", "short", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_as_texts(device: str, window: int, sinks: bool, dtype: torch.dtype) -> None:
    """Deep trees, a request without candidates, a prefix of one token and one of none, heads in groups."""
    step = Step([70, 33, 1, 5, 0], [16, 0, 9, 12, 4], (6, 2), 32, dtype, device, sinks)
    check(step, window, 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("count", [0, 9], ids=["no candidates", "a tree"])
def test_a_window_s_first_slot_is_a_block_s_last(device: str, count: int) -> None:
    """Of a row without candidates, the prefix's last one, the window begins one slot before a root's."""
    window = 20
    step = Step([2 * BLOCK_KEYS - 1 + window], [count], (2, 1), 16, torch.float32, device, sinks=False)
    check(step, window, 1e-5)


@settings(max_examples=15, deadline=None)
@given(
    prefix_lens=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    window=st.integers(1, 70),
    count=st.integers(0, 34).filter(lambda count: count != 1),
    sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_step(prefix_lens: list[int], window: int, count: int, sinks: bool, seed: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [count] * len(prefix_lens)
    check(Step(prefix_lens, rows, (2, 1), 16, torch.float32, device, sinks, seed), window, 1e-5)
