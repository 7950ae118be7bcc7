# SPDX-License-Identifier: Apache-2.0
"""Rows of several tensors side by side: against torch's own."""

from __future__ import annotations

import pytest
import torch

from vllm_dflash.kernels.gather_features import gather_features


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tensors", "width"), [(1, 8), (3, 1500), (5, 1024)])
def test_as_in_torch(device: str, num_tensors: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    states = [torch.randn(7, width + 4, device=device).to(dtype)[:, :width] for _ in range(num_tensors)]
    rows = torch.tensor([6, 0, 0, 3], dtype=torch.int32, device=device)
    wide = torch.full((5, num_tensors * width + 3), -9.0, dtype=dtype, device=device)
    out = wide[:4, : num_tensors * width]
    gather_features(out, states, rows)
    assert torch.equal(out, torch.cat([each[rows.long()] for each in states], dim=-1))
    assert (wide[4] == -9).all() and (wide[:, num_tensors * width :] == -9).all()


def test_no_rows(device: str) -> None:
    states = [torch.ones(2, 4, device=device)]
    gather_features(torch.empty(0, 4, device=device), states, torch.empty(0, dtype=torch.int32, device=device))


def test_other_tensors_in_the_same_memory(device: str) -> None:
    """Addresses are kept, not what was there."""
    states = torch.arange(8.0, device=device).view(2, 4)
    out = torch.empty(1, 4, device=device)
    for _ in range(2):
        gather_features(out, [states], torch.tensor([1], device=device))
        assert torch.equal(out, states[1:])
        states += 1
