# SPDX-License-Identifier: Apache-2.0
"""The GPUs of this machine, asked of the driver's own tool: no torch, no CUDA context."""

from __future__ import annotations

import shutil
import subprocess

from vllm_dflash.doctor.facts import Machine

_TOOL = "nvidia-smi"
_TIMEOUT_S = 10
_MIB = 2**20


def read_machine() -> Machine:
    """Names and memory of the GPUs; none where the tool is missing, fails or does not answer."""
    tool = shutil.which(_TOOL)
    if tool is None:
        return Machine()
    command = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return Machine()  # no driver is the same as no GPU: the report then says so
    return Machine(tuple(_parse(line) for line in answer.splitlines() if line.strip()))


def _parse(line: str) -> tuple[str, int]:
    """Of "NVIDIA H100 80GB HBM3, 81559": the name, and bytes."""
    name, _, mebibytes = line.rpartition(",")
    return name.strip(), int(mebibytes) * _MIB if mebibytes.strip().isdigit() else 0
