# SPDX-License-Identifier: Apache-2.0
"""An engine of two workers, one without this plugin, one with another version: a clear error, no hang, nothing left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.e2e.engines import CHILD, ROOT, RUNNERS, TARGET, TIMEOUT_S, dflash, environment
from vllm_dflash import __version__

pytestmark = pytest.mark.engine

LLM = {"model": str(TARGET), "dtype": "float32", "max_model_len": 256, "tensor_parallel_size": 2}


def left_running(session: int) -> list[str]:
    """What still runs of a session; not what has ended and waits for its parent to notice."""
    listing = subprocess.run(["ps", "-o", "stat=,args=", "-g", str(session)], capture_output=True, text=True).stdout
    return [line for line in listing.splitlines() if not line.startswith("Z")]


def test_every_worker_at_fault_is_named(tmp_path):
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"llm": LLM | dflash(), "runs": []}))
    site = f"{ROOT / 'tests' / 'worker_site'}{os.pathsep}{ROOT}"
    process = subprocess.Popen(
        [sys.executable, str(CHILD), str(job), str(tmp_path / "result.json")],
        env=environment(**RUNNERS["V1"], PYTHONPATH=site, VLLM_CPU_OMP_THREADS_BIND="0|1"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        log, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode != 0
    for rank, fault in (
        (0, f"vllm-dflash is 0.0.7 there, the engine's configuration is by {__version__}; install the same"),
        (1, "vllm_dflash cannot be imported (ModuleNotFoundError: No module named 'vllm_dflash'); install it in that "
            f"environment with pip (pip install vllm-dflash=={__version__})"),
    ):  # fmt: skip
        assert f"rank {rank} on host {socket.gethostname()}: {fault}" in log, log[-4000:]
    assert "engine core on" not in log
    deadline = time.monotonic() + 20
    while left_running(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left_running(process.pid)
