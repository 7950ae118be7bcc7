# SPDX-License-Identifier: Apache-2.0
"""The parent's side of an engine in a process of its own: start it, ask it, notice its death, end it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from gpu.names import Record, is_ours, measures_itself
from gpu.output import say


class EngineError(RuntimeError):
    """An engine's process died or did not answer in time; the message ends with its log's tail."""


class Engine:
    """One engine in a process of its own, answering one request at a time over a pipe. Output goes to `log`."""

    def __init__(self, name: str, script: str, job: Record, environment: dict[str, str], log: Path) -> None:
        self.name, self.log = name, log
        self.connection, theirs = Pipe()
        with log.open("wb") as output, theirs:
            self.process = subprocess.Popen(
                [sys.executable, script, "--child", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # so that one signal reaches vLLM's own children too
            )
        self.connection.send(job)

    def ask(self, request: Record, timeout: float) -> Any:
        """Send a request and wait for its answer. Raises EngineError."""
        try:
            self.connection.send(request)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EngineError(self._obituary("died")) from error
        return self.receive(timeout)

    def receive(self, timeout: float) -> Any:
        """The next answer. Raises EngineError."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            with contextlib.suppress(EOFError, ConnectionResetError):
                if self.connection.poll(0 if ended else 0.2):
                    return self.connection.recv()
                if not ended:
                    continue
            raise EngineError(self._obituary("died"))
        raise EngineError(self._obituary(f"gave no answer for {timeout:.0f} s"))

    def _obituary(self, fate: str) -> str:
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])
        return f"engine {self.name!r} {fate}; the end of {self.log}:\n{tail}"

    def stop(self) -> None:
        """End the process group, at once: an engine has nothing to save."""
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def started_engines(
    jobs: dict[str, Record], script: str, environments: dict[str, dict[str, str]], logs: Path, timeout: float
) -> Iterator[tuple[dict[str, Engine], dict[str, Record]]]:
    """Start all engines; yields them and what each says of itself, in the order of `jobs`. None is left running.

    `timeout`, s, is for all that start side by side.
    """
    say(f"starting {len(jobs)} engines; their output: {logs}")
    engines: dict[str, Engine] = {}
    facts: dict[str, Record] = {}
    try:
        for names in start_groups(jobs):
            deadline = time.monotonic() + timeout
            for name in names:
                engines[name] = Engine(name, script, jobs[name], environments[name], logs / f"{name}.log")
            for name in names:
                facts[name] = engines[name].receive(max(1.0, deadline - time.monotonic()))
                say(f"{name}: {json.dumps(facts[name])}")
        yield {name: engines[name] for name in jobs}, {name: facts[name] for name in jobs}
    finally:
        for engine in engines.values():
            engine.stop()


def start_groups(names: Collection[str]) -> list[list[str]]:
    """Engines that start side by side, and behind them one by one those that time their steps: others would disturb."""
    timing = [name for name in names if measures_itself(name)]
    together = [name for name in names if name not in timing]
    return [group for group in (together, *([name] for name in timing)) if group]


def environment(name: str) -> dict[str, str]:
    """A child's environment: which plugins it loads is the one difference between the engines."""
    ours = {
        "VLLM_PLUGINS": "dflash" if is_ours(name) else "",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        # Without these, tracing an engine that replays CUDA graphs can crash it.
        "DISABLE_CUPTI_LAZY_REINIT": "1",
        "TEARDOWN_CUPTI": "0",
    }
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB, on a CPU
    kept = {key: value for key, value in os.environ.items() if key != "VLLM_DFLASH"}
    return defaults | kept | ours
