# SPDX-License-Identifier: Apache-2.0
"""Starting a real `vllm serve` for the end-to-end tests, with the shipped pair."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.e2e.engines import DRAFTER, TARGET, TIMEOUT_S, VLLM, environment


@contextlib.contextmanager
def serving(folder: Path, *arguments: str, **env: str) -> Iterator[tuple[str, Path]]:
    """A server with the two arguments a user gives (and fp32, for exact ids), and `arguments`: its URL and log."""
    port, log = free_port(), folder / "serve.log"
    speculative = json.dumps({"method": "dflash", "model": str(DRAFTER)})
    with log.open("w") as stream:
        process = subprocess.Popen(
            [VLLM, "serve", str(TARGET), "--speculative-config", speculative, "--dtype", "float32",
             "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny", *arguments],
            env=environment(**env), stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(url, process, log)
        yield url, log
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "\n".join(log.read_text().splitlines()[-30:])
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise TimeoutError("\n".join(log.read_text().splitlines()[-30:]))
