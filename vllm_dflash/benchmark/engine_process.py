# SPDX-License-Identifier: Apache-2.0
"""The parent's side of an offline engine: start the child, relay what it reports, leave no process behind."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_dflash.benchmark.job import EngineJob, EngineResult, Finished, LoadJob, Ready, Response

#: The engine child; the file descriptor of its pipe comes last.
CHILD = (sys.executable, "-m", "vllm_dflash.benchmark.offline")
POLL_S = 0.2
#: How long vLLM may take to end by itself before it is made to.
GRACE_S = 15.0


class EngineFailedError(RuntimeError):
    """The engine's process ended before its job did, or says nothing any more. log: what it has written."""

    def __init__(self, what: str, log: Path) -> None:
        super().__init__(f"vLLM's process {what}")
        self.log = log


def run_engine(job: EngineJob, log: Path, on_message: Callable[[Ready | Response], None]) -> EngineResult:
    """Run a job in a child process, whose output goes to `log`; call `on_message` as it gets on.

    Raises EngineFailedError if the child ends early. However this function is left, the child's process group is gone.
    """
    ready: Ready | None = None
    responses: list[Response] = []
    with engine_child(CHILD, job, engine_environment(job, os.environ), log) as (child, connection):
        while not isinstance(message := receive(child, connection, log), Finished):
            if isinstance(message, Ready):
                ready = message
            else:
                responses.append(message)
            on_message(message)
    if ready is None:
        raise RuntimeError("the engine child broke its protocol: it finished without having been ready")
    return EngineResult(ready.seconds, tuple(responses), message.acceptance)


@contextlib.contextmanager
def engine_child(
    command: Sequence[str], job: Any, environment: Mapping[str, str], log: Path
) -> Iterator[tuple[subprocess.Popen[bytes], Connection]]:
    """A child that has been sent its job, and the pipe to it. Its process group is gone when the block is left."""
    ours, theirs = Pipe()
    with log.open("wb") as output, ours:
        with theirs:
            child = subprocess.Popen(
                [*command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # so that one signal reaches vLLM's own children too
            )
        try:
            with contextlib.suppress(BrokenPipeError):  # a child that is already gone is found by receive
                ours.send(job)
            yield child, ours
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_S)
        finally:
            _end_group(child)


def receive(child: subprocess.Popen[bytes], connection: Connection, log: Path, patience: float = math.inf) -> Any:
    """The child's next message. Raises EngineFailedError if it ends before, or sends none for `patience` seconds.

    Polls, because vLLM's own children may hold the pipe open after it.
    """
    deadline = time.monotonic() + patience
    while True:
        ended = child.poll() is not None
        try:
            if connection.poll(0 if ended else POLL_S):
                return connection.recv()
        except (EOFError, ConnectionResetError):
            child.wait(GRACE_S)
            ended = True
        if ended:
            raise EngineFailedError(f"ended with exit status {child.returncode}", log)
        if time.monotonic() > deadline:
            raise EngineFailedError(f"has said nothing for {patience:g} s", log)


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """Ask the child to end if it still runs, then make sure of its whole process group."""
    with contextlib.suppress(ProcessLookupError):
        if child.poll() is None:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_S)
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def engine_environment(job: EngineJob | LoadJob, base: Mapping[str, str]) -> dict[str, str]:
    """The child's environment: `base`, plus what a local run should have unless the user says otherwise."""
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}  # GiB; vLLM would take half of the memory
    if all(Path(model).is_dir() for model in (job.target, job.drafter or job.target)):
        defaults["HF_HUB_OFFLINE"] = "1"
    return defaults | dict(base)
