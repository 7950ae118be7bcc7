# SPDX-License-Identifier: Apache-2.0
"""When two computations of the same thing are the same: error measured against a low-precision baseline's own."""

from __future__ import annotations

import torch


def assert_as_close_as_baseline(
    name: str,
    got: torch.Tensor,
    truth: torch.Tensor,  # computed in a wider type
    baseline: torch.Tensor,  # the reference, computed in the type of `got`
    factor: float = 8.0,
) -> None:
    """Require error(got) <= factor * error(baseline) + a few roundings at the largest magnitude.

    `factor` allows another order of summation; a wrong weight, position or mask is off by orders of magnitude more.
    """
    assert got.shape == truth.shape == baseline.shape, f"{name}: {got.shape}, {truth.shape}, {baseline.shape}"
    truth = truth.double()
    error, allowed = (got.double() - truth).abs(), (baseline.double() - truth).abs().max().item()
    bound = factor * allowed + 4 * torch.finfo(got.dtype).eps * truth.abs().max().item()
    worst = error.max().item()
    where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert worst <= bound, f"{name}: max error {worst:.3g} at {where} > {bound:.3g} (baseline {allowed:.3g})"
