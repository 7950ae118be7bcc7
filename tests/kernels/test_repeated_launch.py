# SPDX-License-Identifier: Apache-2.0
"""Which compiled variant a launch takes. That kernels launched so do what they should is what their own tests see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.triton_utils import triton

from vllm_dflash.kernels.repeated_launch import RepeatedLaunch


class Compiled:
    """A variant, which remembers what it was launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.launches.append((grid[:3], *arguments))


class Kernel:
    """`kernel[grid](...)` compiles a variant, launches it and returns it, as Triton's does."""

    arg_names = ("values_ptr", "count", "N", "BLOCK")

    def __init__(self) -> None:
        self.variants: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **meta: Any) -> Compiled:
            self.variants.append(Compiled())
            return self.variants[-1]

        return launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(triton.runtime, "JITFunction", Kernel)
    return Kernel()


def test_the_second_launch_is_the_variant_s(kernel: Kernel) -> None:
    launch, values, others = RepeatedLaunch(kernel), torch.zeros(64), torch.ones(64)
    launch[(3,)](values, 7, N=5, BLOCK=8, num_warps=1)
    launch[(4, 2)](others, 9, BLOCK=8, N=5, num_warps=1)  # another order of names
    assert [len(variant.launches) for variant in kernel.variants] == [0, 0]
    launch[(4, 2)](others, 9, N=5, BLOCK=8, num_warps=1)
    ((grid, argument, count, *constexprs),) = kernel.variants[0].launches
    assert grid == (4, 2, 1) and argument is others and (count, *constexprs) == (9, 5, 8)


@pytest.mark.parametrize(
    ("values", "count", "meta"),
    [
        pytest.param(torch.zeros(64, dtype=torch.int64), 7, {}, id="type"),
        pytest.param(torch.zeros(64)[1:], 7, {}, id="alignment"),
        pytest.param(torch.zeros(64), 1, {}, id="one"),
        pytest.param(torch.zeros(64), 16, {}, id="divisible"),
        pytest.param(torch.zeros(64), 2**40 + 1, {}, id="wide"),
        pytest.param(torch.zeros(64), 7, {"BLOCK": 16}, id="constexpr"),
        pytest.param(torch.zeros(64), 7, {"num_warps": 2}, id="option"),
    ],
)
def test_other_arguments_are_compiled_for(
    kernel: Kernel, values: torch.Tensor, count: int, meta: dict[str, int]
) -> None:
    launch = RepeatedLaunch(kernel)
    usual = {"N": 5, "BLOCK": 8, "num_warps": 1}
    launch[(1,)](torch.zeros(64), 7, **usual)
    launch[(1,)](values, count, **usual | meta)
    assert len(kernel.variants) == 2 and not kernel.variants[0].launches


def test_fractions_share_a_variant(kernel: Kernel) -> None:
    launch = RepeatedLaunch(kernel)
    for scale in (0.5, 1.0, 16.0):
        launch[(1,)](torch.zeros(64), scale, N=5, BLOCK=8)
    assert [[given[2] for given in variant.launches] for variant in kernel.variants] == [[1.0, 16.0]]
    launch[(1,)](torch.zeros(64), 16, N=5, BLOCK=8)
    assert len(kernel.variants) == 2


def test_what_cannot_be_told_apart(kernel: Kernel) -> None:
    with pytest.raises(TypeError, match="str"):
        RepeatedLaunch(kernel)[(1,)](torch.zeros(64), "7", N=5, BLOCK=8)


def test_the_interpreter_has_no_variants() -> None:
    seen = []
    kernel = {(2,): lambda *arguments, **meta: seen.append((arguments, meta))}
    for _ in range(2):
        RepeatedLaunch(kernel)[(2,)](1, N=3)
    assert seen == [((1,), {"N": 3})] * 2
