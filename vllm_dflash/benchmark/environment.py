# SPDX-License-Identifier: Apache-2.0
"""What a number was measured on: versions and machine. Of a server only this side is seen."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import vllm_dflash

PACKAGES = ("vllm", "torch", "transformers", "httpx")


def environment() -> dict[str, str]:
    """Label and value, for people."""
    found = {"vllm_dflash": vllm_dflash.__version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["System"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    found["CPU"] = f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores usable"
    if gpus := _gpu_names():
        found["GPU"] = gpus
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def _gpu_names() -> str:
    """From the driver's own files, so that neither torch nor a GPU context is needed."""
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        lines = file.read_text(encoding="utf-8").splitlines()
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model")]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
