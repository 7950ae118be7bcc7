# SPDX-License-Identifier: Apache-2.0
"""Launches that come at every step, with less of Triton's own bookkeeping on the host.

Triton works out at each launch which compiled variant its arguments ask for. On small targets the host is what a step
waits for, and half a dozen such launches are then a tenth of the step. Here a variant is remembered by its arguments'
types and alignments.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from vllm.triton_utils import triton

Grid = tuple[int, ...]


class RepeatedLaunch:
    """A decorator above `@triton.jit`: `kernel[grid](*arguments, **constexprs_and_options)`, as ever.

    The kernel's constexprs come last in its signature and are given by name, all else by place.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._variants: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        """The kernel for so many programs."""
        return partial(self._launch, grid)

    def _launch(self, grid: Grid, *arguments: Any, **meta: Any) -> None:
        if not isinstance(self.kernel, triton.runtime.JITFunction):  # Triton's interpreter has no variants
            self.kernel[grid](*arguments, **meta)
            return
        key = (*map(_kind, arguments), *meta.items())
        variant = self._variants.get(key)
        if variant is None:
            compiled = self.kernel[grid](*arguments, **meta)
            self._variants[key] = compiled, tuple(meta[name] for name in self.kernel.arg_names[len(arguments) :])
            return
        (compiled, constexprs), of_three = variant, (*grid, 1, 1)
        compiled[of_three](*arguments, *constexprs)


def _kind(argument: Any) -> tuple[Any, ...]:
    """All that Triton's choice of a variant may depend on."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if type(argument) is int:
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    if type(argument) is float:  # never built into a variant
        return (float,)
    raise TypeError(f"{type(argument).__name__}: only tensors and numbers are told apart")
