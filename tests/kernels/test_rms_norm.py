# SPDX-License-Identifier: Apache-2.0
"""The first half of an RMSNorm: a literal by hand, then any rows against plain torch."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_dflash.kernels.rms_norm import Normed, divide_rows, norm_rows, reference_norm_rows


def test_by_hand(device: str) -> None:
    x = torch.tensor([[3.0, -4.0], [0.5, 0.0]], device=device)
    normed = norm_rows(x, torch.tensor([2.0, 10.0], device=device), 1e-5)
    assert normed.rows.tolist() == [[6, -40], [1, 0]]
    assert normed.squares.tolist() == [[25, 0.25]] and normed.eps == 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "k"), [(1, 16), (5, 72), (17, 4096)])
def test_any_rows(device: str, num_rows: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide = torch.full((num_rows + 1, k + 8), math.nan, device=device, dtype=dtype)
    wide[:num_rows, :k] = torch.randn(num_rows, k, device=device)
    x, weight = wide[:num_rows, :k], (torch.rand(k, device=device) + 0.5).to(dtype)
    got, expected = norm_rows(x, weight, 1e-6), reference_norm_rows(x, weight, 1e-6)
    # Triton's interpreter does not round to the nearest bf16.
    torch.testing.assert_close(got.rows, expected.rows, rtol=torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(got.squares, expected.squares)
    # Both halves together are torch's norm.
    divided = got.rows.float() * torch.rsqrt(got.squares.sum(0) / k + got.eps)[:, None]
    whole = torch.nn.functional.rms_norm(x.float(), (k,), weight.float(), 1e-6)
    torch.testing.assert_close(divided, whole, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_no_rows(device: str) -> None:
    normed = norm_rows(torch.empty(0, 16, device=device), torch.ones(16, device=device), 1e-6)
    assert normed.rows.shape == (0, 16) and normed.squares.shape == (1, 0)


def test_squares_of_other_rows_are_refused() -> None:
    with pytest.raises(AssertionError):
        Normed(torch.ones(3, 16), torch.ones(1, 4), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "k", "parts"), [(1, 64, 1), (5, 96, 3)])
def test_both_halves_are_a_norm(device: str, num_rows: int, k: int, parts: int, dtype: torch.dtype) -> None:
    torch.manual_seed(k)
    x = torch.randn(num_rows, k, device=device).to(dtype)
    weight = torch.rand(k, device=device).to(dtype)
    squares = x.float().square().view(num_rows, parts, -1).sum(dim=2).t().contiguous()
    got = divide_rows(Normed((x.float() * weight).to(dtype), squares, 1e-6))
    expected = torch.nn.functional.rms_norm(x.double(), (k,), weight.double(), 1e-6).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1.6e-2  # bf16: rounded twice
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
