# SPDX-License-Identifier: Apache-2.0
"""The likeliest token without logits: literals by hand, ties, anchors, and any shape against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from vllm_dflash.kernels import lm_head
from vllm_dflash.kernels.lm_head import argmax_linear, reference_argmax_linear
from vllm_dflash.kernels.skinny_linear import Tile

UNTOUCHED = -777
FP8 = torch.float8_e4m3fn
SMALL = Tile(block_n=16, block_k=16)


def run(
    x: torch.Tensor,  # [M, K]
    weight: torch.Tensor,  # [V, K]
    tile: Tile = SMALL,
    **arguments: Any,
) -> list[int]:
    """The kernel's ids, after a check that it wrote one for every row and nothing else."""
    num_query_rows = arguments.get("num_query_rows")
    rows = x.shape[0] - (x.shape[0] // num_query_rows if num_query_rows else 0)
    buffer = torch.full((rows + 4,), UNTOUCHED, device=x.device)
    ids = argmax_linear(x, weight, out=buffer[2 : 2 + rows], tile=tile, **arguments).tolist()
    assert buffer[:2].tolist() == buffer[-2:].tolist() == [UNTOUCHED] * 2, "written outside"
    return ids


def unit_rows(device: str, *columns: int) -> torch.Tensor:
    """One row for each of `columns`: 1 in that column, 0 in the other 15."""
    return torch.eye(16, device=device)[list(columns)]


def test_argmax_by_hand(device: str) -> None:
    # Three tiles of 16 rows, the last one cut off. All logits of the second row are negative.
    weight = torch.full((40, 16), -5.0, device=device)
    weight[37, 0], weight[20, 1], weight[3, 2] = 1, -4, 9
    assert run(unit_rows(device, 0, 1, 2), weight) == [37, 20, 3]


def test_of_equal_logits_the_first_wins(device: str) -> None:
    weight = torch.zeros(70, 16, device=device)
    weight[[5, 6, 40], 0] = 3  # in one tile, and in two
    weight[[15, 16, 69], 1] = 3  # on both sides of a tile's edge
    weight[[32, 66], 2] = 3  # nowhere in the first tiles
    assert run(unit_rows(device, 0, 1, 2, 3), weight) == [5, 15, 32, 0]


def test_the_last_row_may_win(device: str) -> None:
    # 33 rows in tiles of 16: rows past the end repeat the last one, and must not give their own index.
    weight = torch.zeros(33, 16, device=device)
    weight[32, 0] = 1
    assert run(unit_rows(device, 0), weight) == [32]


def test_anchor_rows_are_left_out(device: str) -> None:
    # Two requests of 3 rows; an anchor would give NaN.
    x = torch.full((6, 16), math.nan, device=device)
    x[[1, 2, 4, 5]] = unit_rows(device, 4, 5, 6, 7)
    assert run(x, torch.eye(16, device=device), num_query_rows=3) == [4, 5, 6, 7]


def test_row_ids_name_the_rows(device: str) -> None:
    ids = torch.arange(1000, 1016, device=device)
    assert run(unit_rows(device, 4, 2), torch.eye(16, device=device), row_ids=ids) == [1004, 1002]


def test_scale_decides(device: str) -> None:
    weight = torch.zeros(16, 16, device=device)
    weight[3, 0], weight[9, 0] = 4, 1
    scale = torch.ones(16, device=device)
    assert run(unit_rows(device, 0), weight.to(FP8), weight_scale=scale) == [3]
    scale[9] = 5
    assert run(unit_rows(device, 0), weight.to(FP8), weight_scale=scale) == [9]


def test_many_tiles_are_reduced_in_turns(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "_BLOCK_TILES", 4)
    weight = torch.zeros(16 * 11, 16, device=device)
    weight[170, 0] = 1
    weight[[70, 130, 140], 1] = 1  # tiles 4, 8 and 8: one lane, then another
    assert run(unit_rows(device, 0, 1, 2), weight) == [170, 70, 0]


@pytest.mark.parametrize("tile", [SMALL, Tile(32, 32, weights_left=False)], ids=["left", "right"])
@pytest.mark.parametrize("weight_dtype", ["same", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_shape_finds_a_largest_logit(device: str, dtype: torch.dtype, weight_dtype: str, tile: Tile) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter multiplies the bit patterns of bf16")
    if tile.block_k < 32 and weight_dtype == "fp8" and device == "cuda":
        pytest.skip("FP8 products of the hardware take 32 columns at least")
    torch.manual_seed(0)
    num_query_rows, vocab_size, k = 6, 130, 80
    x = torch.randn(3 * num_query_rows, k, device=device).to(dtype)
    weight = torch.randn(vocab_size, k, device=device).to(dtype if weight_dtype == "same" else FP8)
    arguments: dict[str, Any] = {}
    if weight_dtype == "fp8":
        arguments["weight_scale"] = torch.rand(vocab_size, device=device) + 0.5
    ids = torch.tensor(run(x, weight, tile, num_query_rows=num_query_rows, **arguments), device=device)
    # Rows whose best two logits are clearly apart have one right answer, and these must be nearly all.
    logits = x.double().view(3, num_query_rows, k)[:, 1:].flatten(0, 1) @ weight.double().T
    logits = logits * arguments["weight_scale"].double() if weight_dtype == "fp8" else logits
    best = logits.topk(2, dim=1)
    margin = (30 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps * logits.abs().max()
    clear = best.values[:, 0] - best.values[:, 1] > margin
    assert clear.sum() >= 8
    assert torch.equal(ids[clear], best.indices[clear, 0])
    chosen = logits.gather(1, ids[:, None])[:, 0]
    assert (best.values[:, 0] - chosen <= margin).all()


def test_reference_by_hand(device: str) -> None:
    x, ids = unit_rows(device, 8, 3, 4, 9, 1, 2), torch.arange(100, 116, device=device)
    got = reference_argmax_linear(x, torch.eye(16, device=device), row_ids=ids, num_query_rows=3)
    assert got.tolist() == [103, 104, 101, 102]


def test_no_rows(device: str) -> None:
    assert argmax_linear(torch.empty(0, 16, device=device), torch.ones(8, 16, device=device)).shape == (0,)


def test_rows_that_are_no_whole_requests_are_refused(device: str) -> None:
    with pytest.raises(AssertionError, match="not requests of 4"):
        argmax_linear(torch.ones(6, 16, device=device), torch.ones(8, 16, device=device), num_query_rows=4)
