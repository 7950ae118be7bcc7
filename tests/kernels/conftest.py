# SPDX-License-Identifier: Apache-2.0
"""Kernels run natively on a CUDA device, and in Triton's interpreter on a machine that has none."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import triton_cpu


def _has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


RUNNABLE = all(find_spec(name) is not None for name in ("torch", "triton", "vllm"))
DEVICE = "cuda" if RUNNABLE and _has_cuda() else "cpu"

if not RUNNABLE:
    collect_ignore_glob = ["test_*.py"]
elif DEVICE == "cpu":
    # Here, since the test modules import vllm.
    triton_cpu.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse to interpret Triton in a process that also runs other tests: theirs is vLLM without Triton."""
    here = Path(__file__).parent
    if DEVICE == "cpu" and any(here not in item.path.parents for item in items):
        raise pytest.UsageError(
            "tests/kernels needs a process of its own where there is no CUDA device: use `make test`, or run "
            "`pytest tests/kernels` and `pytest tests --ignore=tests/kernels`."
        )


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run: "cuda" or "cpu"."""
    return DEVICE
