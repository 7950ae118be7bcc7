# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter on a machine without a GPU: the same kernels, run slowly by numpy.

Triton only runs with an active GPU driver, and vLLM hides Triton where it finds none. `install()` makes both of them
content. It comes before vLLM and Triton are imported, since both decide at import, so it needs a process of its own.
"""

from __future__ import annotations

import os
import sys
from typing import Any


class StandInDriver:
    """All that vLLM and Triton ask of a driver before the interpreter takes over."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cpu", 0, 0)


def install() -> None:
    """Have `vllm.triton_utils` yield the real Triton, and `triton.jit` interpret, within memory. Safe to call again.

    The setting is inherited by child processes, the driver is not: a spawned one calls `install()` itself.
    """
    if _is_installed():
        return
    if late := [name for name in ("vllm", "triton") if name in sys.modules]:
        raise RuntimeError(
            f"{' and '.join(late)} imported before tests.triton_cpu.install(), so Triton cannot be set up for the CPU "
            "any more. The tests of tests/kernels need a process of their own: use `make test`, or "
            "`pytest tests/kernels` alone."
        )
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import Backend, backends

    backends["cpu"] = Backend(compiler=None, driver=StandInDriver)
    _accept_integer_masks()
    from tests import memcheck  # imports torch

    memcheck.install()


def _accept_integer_masks() -> None:
    """The interpreter keeps some results of `&` as integers, which its loads and stores refuse for a mask."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def as_bool(mask: Any) -> Any:
        return TensorHandle(mask.data.astype(bool), mask.dtype)

    def masked_load(self: Any, ptrs: Any, mask: Any, *options: Any) -> Any:
        return load(self, ptrs, as_bool(mask), *options)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, cache_policy: Any) -> Any:
        return store(self, ptrs, value, as_bool(mask), cache_policy)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = masked_load, masked_store


def _is_installed() -> bool:
    # Not by importing triton: that would itself decide how its functions are compiled.
    module = sys.modules.get("triton.backends")
    backend = getattr(module, "backends", {}).get("cpu")
    return backend is not None and backend.driver.__name__ == StandInDriver.__name__
