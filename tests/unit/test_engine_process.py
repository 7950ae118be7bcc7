# SPDX-License-Identifier: Apache-2.0
"""The parent's side of an engine child, with stand-ins for the child: protocol, failure, and no process left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_dflash.benchmark import engine_process
from vllm_dflash.benchmark.engine_process import EngineFailedError, engine_environment, run_engine
from vllm_dflash.benchmark.job import EngineJob, EngineResult, Prompt, Ready, Response

JOB = EngineJob(target="some/target", prompts=(Prompt("a", "x = "),))

PREAMBLE = """
import subprocess, sys, time
from multiprocessing.connection import Connection
from vllm_dflash.benchmark.job import Finished, Ready, Response
connection = Connection(int(sys.argv[1]))
job = connection.recv()
"""
# A child of the child that outlives it unless somebody ends it, and holds the pipe open.
GRANDCHILD = """
sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=[int(sys.argv[1])])
print(sleeper.pid, flush=True)
"""
WORK = """
connection.send(Ready(1.5))
connection.send(Response(job.prompts[0], "1", (7, 8), 0.5))
connection.send(Finished(None))
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "engine.log"


def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    script = tmp_path / "child.py"
    script.write_text(PREAMBLE + code, encoding="utf-8")
    monkeypatch.setattr(engine_process, "CHILD", (sys.executable, str(script)))


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie that only waits for its parent."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def test_messages_become_a_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: Path) -> None:
    stand_in(monkeypatch, tmp_path, "print('noise of the engine')" + WORK)
    seen: list[Ready | Response] = []
    response = Response(JOB.prompts[0], "1", (7, 8), 0.5)
    assert run_engine(JOB, log, seen.append) == EngineResult(1.5, (response,), None)
    assert seen == [Ready(1.5), response]
    assert log.read_text() == "noise of the engine\n"


def test_result_counts_tokens_per_second() -> None:
    responses = (Response(JOB.prompts[0], "", (1, 2, 3), 0.5), Response(JOB.prompts[0], "", (4,), 1.5))
    assert EngineResult(0.0, responses, None).tokens_per_second == 2.0  # 4 tokens in 2 s


def test_a_child_that_fails_is_reported_with_its_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: Path
) -> None:
    stand_in(monkeypatch, tmp_path, GRANDCHILD + "sys.exit('wrong drafter')")
    with pytest.raises(EngineFailedError, match="exit status 1") as failure:
        run_engine(JOB, log, lambda message: None)
    assert failure.value.log == log
    pid, message = log.read_text().splitlines()
    assert message == "wrong drafter"
    assert wait_until_gone(int(pid))


def test_nothing_is_left_behind_after_success(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: Path) -> None:
    stand_in(monkeypatch, tmp_path, GRANDCHILD + WORK)
    run_engine(JOB, log, lambda message: None)
    assert wait_until_gone(int(log.read_text()))


def test_nothing_is_left_behind_after_an_interrupt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: Path) -> None:
    stand_in(monkeypatch, tmp_path, GRANDCHILD + "connection.send(Ready(1.0))\ntime.sleep(600)")

    def interrupt(message: Ready | Response) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_engine(JOB, log, interrupt)
    assert wait_until_gone(int(log.read_text()))


def test_the_engine_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    child = tmp_path / "child.py"
    child.write_text(
        PREAMBLE + "from vllm_dflash.benchmark.offline import _die_with_parent\n_die_with_parent(connection)"
        f"{GRANDCHILD}time.sleep(600)",
        encoding="utf-8",
    )
    log = tmp_path / "engine.log"
    parent = (
        "import sys, pathlib; from vllm_dflash.benchmark import engine_process as e, job as j;"
        f"e.CHILD = (sys.executable, {str(child)!r});"
        f"e.run_engine(j.EngineJob('t', (j.Prompt('a', 'x'),)), pathlib.Path({str(log)!r}), print)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert wait_until_gone(int(log.read_text()))


def test_environment_has_defaults_that_the_user_can_override(tmp_path: Path) -> None:
    local = EngineJob(target=str(tmp_path), prompts=JOB.prompts)
    assert engine_environment(local, {"VLLM_CPU_KVCACHE_SPACE": "4", "HOME": "/h"}) == {
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "HOME": "/h",
    }


@pytest.mark.parametrize("drafter", [None, "/"])
def test_hub_models_leave_the_hub_reachable(drafter: str | None) -> None:
    job = EngineJob(target="some/target", prompts=JOB.prompts, drafter=drafter)
    assert "HF_HUB_OFFLINE" not in engine_environment(job, {})
