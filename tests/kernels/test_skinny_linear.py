# SPDX-License-Identifier: Apache-2.0
"""A linear layer for few rows: literals by hand, then any shape against float64, amid fences that show stray access."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.numerics import assert_as_close_as_baseline
from vllm_dflash.kernels import skinny_linear as module
from vllm_dflash.kernels.rms_norm import norm_rows
from vllm_dflash.kernels.skinny_linear import (
    Tile,
    choose_tile,
    new_counters,
    reference_skinny_linear,
    skinny_linear,
    skinny_linear_normed,
)

UNTOUCHED = 77.0
FP8 = torch.float8_e4m3fn
SMALL = Tile(block_n=16, block_k=16)
#: Every way to cut a product up: both sides of the tensor cores' product, whole sums and parts of sums.
TILES = {
    "whole": Tile(block_n=32, block_k=32),
    "weights right": Tile(block_n=32, block_k=32, weights_left=False),
    "parts": Tile(block_n=16, block_k=16, split_k=2),
    "parts right": Tile(block_n=32, block_k=16, split_k=3, weights_left=False),
    "empty parts": Tile(block_n=16, block_k=64, split_k=4),
}


def fenced(
    values: torch.Tensor,  # [rows, columns]
    fence: float,
) -> torch.Tensor:
    """The same numbers inside a larger buffer of `fence`: more rows, and a stride that is not the width."""
    rows, columns = values.shape
    buffer = torch.full((rows + 3, columns + 16), fence, device=values.device).to(values.dtype)
    buffer[:rows, :columns] = values
    return buffer[:rows, :columns]


def run(
    x: torch.Tensor,  # [M, K]
    weight: torch.Tensor,  # [N, K]
    columns: int,
    norm_weight: torch.Tensor | None = None,  # [K]
    eps: float = 1e-6,
    **arguments: Any,
) -> torch.Tensor:
    """The kernel's output, after a check that it wrote all of it and nothing else."""
    out = fenced(torch.full((x.shape[0], columns), UNTOUCHED, dtype=x.dtype, device=x.device), UNTOUCHED)
    normed = x if norm_weight is None else norm_rows(x, norm_weight, eps)
    result = skinny_linear(normed, weight, out=out, **arguments)
    assert result.data_ptr() == out.data_ptr()
    buffer = out.as_strided((x.shape[0] + 3, columns + 16), (columns + 16, 1))
    assert (buffer[x.shape[0] :] == UNTOUCHED).all() and (buffer[:, columns:] == UNTOUCHED).all(), "written outside"
    return result.clone()


def literal(device: str, *rows: list[float], width: int = 16) -> torch.Tensor:
    """Rows of numbers, padded with zeros to `width` columns."""
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows], device=device)


def test_product_by_hand(device: str) -> None:
    x, weight = literal(device, [1, 2], [0, -1]), literal(device, [3, 4], [5, -6], [1, 0])
    assert run(x, weight, 3, tile=SMALL).tolist() == [[11, -7, 1], [-4, 6, 0]]


def test_scale_and_residual_by_hand(device: str) -> None:
    x, weight = literal(device, [1, 2]), literal(device, [3, 4], [5, -6])
    scale = torch.tensor([2.0, 0.5], device=device)
    residual = torch.tensor([[1.0, 100.0]], device=device)
    got = run(x, weight.to(FP8), 2, weight_scale=scale, residual=residual, tile=SMALL)
    assert got.tolist() == [[1 + 2 * 11, 100 - 7 / 2]]


@pytest.mark.parametrize("split_k", [1, 2])
def test_norm_by_hand(device: str, split_k: int) -> None:
    # 32 columns, mean square (64 + 64) / 32 = 4: x / 2, in whichever part of the columns it stands.
    x, weight = torch.zeros(1, 32, device=device), torch.zeros(1, 32, device=device)
    x[0, 0], x[0, 31], weight[0, 0], weight[0, 31] = 8, -8, 1, 10
    norm = torch.full((32,), 3.0, device=device)
    norm[31] = 0.5
    got = run(x, weight, 1, norm_weight=norm, eps=1e-12, tile=Tile(16, 16, split_k))
    assert got.item() == pytest.approx(4 * 3 * 1 - 4 * 0.5 * 10)


def test_eps_is_added_to_the_mean_square(device: str) -> None:
    x, weight = literal(device, [4]), literal(device, [1])  # mean square 1
    got = run(x, weight, 1, norm_weight=torch.ones(16, device=device), eps=3.0, tile=SMALL)
    assert got.item() == pytest.approx(4 / math.sqrt(1 + 3))


def test_silu_and_mul_by_hand(device: str) -> None:
    # gate rows first, then up rows: outputs silu(x) * 2x and silu(ln 3) * 5 for x = [0, ln 3]
    x = literal(device, [1.0, math.log(3)])
    weight = literal(device, [1, 0], [0, 1], [2, 0], [5, 0])
    silu_of_one = 1 / (1 + math.exp(-1))
    got = run(x, weight, 2, silu_and_mul=True, tile=SMALL)
    assert got.tolist()[0] == pytest.approx([silu_of_one * 2, 0.75 * math.log(3) * 5], rel=1e-6)


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("epilogue", ["plain", "norm", "residual", "silu"])
@pytest.mark.parametrize("weight_dtype", ["same", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_shape_is_as_exact_as_torch(
    device: str, dtype: torch.dtype, weight_dtype: str, epilogue: str, tile: Tile
) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter multiplies the bit patterns of bf16")
    if tile.block_k < 32 and weight_dtype == "fp8" and device == "cuda":
        pytest.skip("FP8 products of the hardware take 32 columns at least")
    torch.manual_seed(0)
    num_rows, n, k = 5, 72, 80
    # Whatever lies beside the operands must not get in: it is NaN.
    x = fenced(torch.randn(num_rows, k, device=device).to(dtype), math.nan)
    weight = fenced(torch.randn(n, k, device=device).to(dtype if weight_dtype == "same" else FP8), math.nan)
    arguments: dict[str, Any] = {"silu_and_mul": epilogue == "silu"}
    if weight_dtype == "fp8":
        arguments["weight_scale"] = torch.rand(n, device=device) + 0.5
    if epilogue in ("norm", "silu"):
        arguments["norm_weight"] = (torch.rand(k, device=device) + 0.5).to(dtype)
    if epilogue == "residual":
        arguments["residual"] = fenced(torch.randn(num_rows, n, device=device).to(dtype), math.nan)
    got = run(x, weight, n // 2 if epilogue == "silu" else n, tile=tile, **arguments)
    baseline = reference_skinny_linear(x, weight, **arguments)
    wide = {name: value.double() if torch.is_tensor(value) else value for name, value in arguments.items()}
    truth = reference_skinny_linear(x.double(), weight.double(), **wide)
    assert_as_close_as_baseline(f"{epilogue} {dtype}", got, truth, baseline)


@pytest.mark.parametrize("num_rows", [1, 16, 17, 130])
def test_any_number_of_rows(device: str, num_rows: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(num_rows, 48, device=device), torch.randn(40, 48, device=device)
    norm, residual = torch.rand(48, device=device), torch.randn(num_rows, 40, device=device)
    arguments = {"norm_weight": norm, "residual": residual}
    got = run(x, weight, 40, tile=Tile(32, 16, split_k=2), **arguments)
    wide = {name: value.double() for name, value in arguments.items()}
    truth = reference_skinny_linear(x.double(), weight.double(), **wide)
    assert_as_close_as_baseline("rows", got, truth, reference_skinny_linear(x, weight, **arguments))


@pytest.mark.parametrize("split_k", [1, 2])
def test_the_next_norm_is_begun_by_hand(device: str, split_k: int) -> None:
    # Products [3, 4] and [0, -8] of 2 columns, in tiles of 16: one part of the squares.
    x, weight = literal(device, [3, 4], [0, -8], width=32), torch.eye(2, 32, device=device)
    norm = torch.tensor([2.0, 0.5], device=device)
    out, normed = skinny_linear_normed(x, weight, norm, 0.25, tile=Tile(16, 16, split_k))
    assert out.tolist() == [[3, 4], [0, -8]]
    assert normed.rows.tolist() == [[6, 2], [0, -4]]
    assert normed.squares.tolist() == [[25, 64]] and normed.eps == 0.25


@pytest.mark.parametrize("tile", [TILES["whole"], TILES["parts right"]], ids=["whole", "parts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_from_norm_to_norm(device: str, dtype: torch.dtype, tile: Tile) -> None:
    """What one product begins the next one finishes: two layers with a norm between them, against float64."""
    torch.manual_seed(0)
    x, residual = (torch.randn(20, n, device=device).to(dtype) for n in (80, 72))
    first, second = (torch.randn(n, k, device=device).to(dtype) for n, k in ((72, 80), (40, 72)))
    norm = (torch.rand(72, device=device) + 0.5).to(dtype)
    states, normed = skinny_linear_normed(x, first, norm, 1e-5, residual=residual, tile=tile)
    assert normed.squares.shape == (math.ceil(72 / tile.block_n), 20)
    got = skinny_linear(normed, second, tile=tile)

    def reference(kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        a, b, c, r, n = (value.to(kind) for value in (x, first, second, residual, norm))
        between = reference_skinny_linear(a, b, residual=r)
        return between, reference_skinny_linear(between, c, norm_weight=n, eps=1e-5)

    for name, mine, true, plain in zip(
        ("states", "out"), (states, got), reference(torch.float64), reference(dtype), strict=True
    ):
        assert_as_close_as_baseline(name, mine, true, plain)


def test_no_rows(device: str) -> None:
    nothing, norm = skinny_linear_normed(
        torch.empty(0, 16, device=device), torch.ones(8, 16, device=device), torch.ones(8, device=device), 1e-6
    )
    assert nothing.shape == norm.rows.shape == (0, 8)
    assert skinny_linear(torch.empty(0, 16, device=device), torch.ones(8, 16, device=device)).shape == (0, 8)


def test_out_may_be_the_residual(device: str) -> None:
    x, weight = literal(device, [1, 2]), literal(device, [3, 4], [5, -6])
    residual = torch.tensor([[1.0, 100.0]], device=device)
    skinny_linear(x, weight, residual=residual, out=residual, tile=Tile(16, 16, split_k=2))
    assert residual.tolist() == [[12, 93]]


def test_parts_leave_their_counters_as_they_were(device: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 64, device=device), torch.randn(40, 64, device=device)
    runs = [skinny_linear(x, weight, tile=Tile(16, 16, split_k=4)) for _ in range(3)]
    assert not module._shared_counters(x.device).any()
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_counters_of_its_own(device: str) -> None:
    torch.manual_seed(0)
    x, weight, own = torch.randn(3, 64, device=device), torch.randn(40, 64, device=device), new_counters(device)
    tile = Tile(16, 16, split_k=4)
    module._shared_counters(x.device)[:3] = 1  # in the middle of another launch
    try:
        got = skinny_linear(x, weight, tile=tile, counters=own)
    finally:
        module._shared_counters(x.device).zero_()
    assert torch.equal(got, skinny_linear(x, weight, tile=tile)) and not own.any()


def test_parts_add_up_in_their_order(device: str) -> None:
    # In fp32 (1e8 + -1e8) + 1 is 1, and 1e8 + (-1e8 + 1) is 0.
    x, weight = torch.zeros(1, 48, device=device), torch.ones(1, 48, device=device)
    x[0, 0], x[0, 16], x[0, 32] = 1e8, -1e8, 1
    assert run(x, weight, 1, tile=Tile(16, 16, split_k=3)).item() == 1


@pytest.mark.parametrize("silu", [False, True])
def test_aliases_and_shapes_that_cannot_be_are_refused(device: str, silu: bool) -> None:
    x, weight = torch.ones(16, 16, device=device), torch.ones(16, 16, device=device)
    with pytest.raises(AssertionError):
        skinny_linear(x, weight, out=x)
    with pytest.raises(AssertionError):
        skinny_linear(x, weight[:, :8])
    with pytest.raises(AssertionError):
        skinny_linear(x, weight, silu_and_mul=silu, residual=torch.ones(16, 9, device=device))
    with pytest.raises(AssertionError):
        skinny_linear(x.half(), weight)
    with pytest.raises(AssertionError):
        skinny_linear_normed(x, weight, torch.ones(8, device=device), 1e-6)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (1024, 2048)])
@pytest.mark.parametrize("num_rows", [1, 16, 64, 128])
def test_a_chosen_tile_fits_an_sm(num_rows: int, n: int, k: int, weight_dtype: torch.dtype) -> None:
    tile = choose_tile(num_rows, n, k, weight_dtype)
    rows = module.block_rows(num_rows)
    stage = tile.block_k * (tile.block_n * weight_dtype.itemsize + rows * 2)
    assert tile.num_stages * stage <= 227 * 1024
    assert k // tile.split_k >= 4 * tile.block_k or tile.split_k == 1, "a pipeline that only fills and drains"
