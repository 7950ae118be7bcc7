# SPDX-License-Identifier: Apache-2.0
"""Engines of its own, with stand-ins for the engine children: who drafts, what is kept, and what a failure leaves."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vllm_dflash import bench_backends
from vllm_dflash.benchmark import offline_runs
from vllm_dflash.benchmark.results import load_results
from vllm_dflash.cli import app

CHILD = """
import os, signal, sys, time
from multiprocessing.connection import Connection
from vllm_dflash.benchmark.job import LoadFinished, Ready
from vllm_dflash.benchmark.metrics import AcceptanceCounts
from vllm_dflash.benchmark.records import Counters, RequestRecord
connection = Connection(int(sys.argv[1]))
job = connection.recv()
print("this engine's log", os.environ["VLLM_DFLASH"], job.drafter, job.num_speculative_tokens)
connection.send(Ready(1.0))
for conversations, concurrency in job.loads:
    for conversation in conversations:
        if conversation.name == "LAST":
            END
        connection.send(RequestRecord(conversation.name, 1, 0.0, 2.0, 0.5, 2.0, 3, 4))
    counts = AcceptanceCounts(2, 6, 3, (2, 1, 0)) if job.drafter else None
    connection.send(LoadFinished(4.0 if job.drafter else 8.0, Counters(counts, 4 * len(conversations))))
"""


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(bench_backends, "new_log_directory", lambda: tmp_path)
    return tmp_path


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, end: str = "pass") -> None:
    """end: what the child does when it gets to the prompt called LAST."""
    script = folder / "child.py"
    script.write_text(CHILD.replace("END", end), encoding="utf-8")
    monkeypatch.setattr(offline_runs, "CHILD", (sys.executable, str(script)))


def invoke(folder: Path, *arguments: str) -> Result:
    prompts = folder / "own.jsonl"
    prompts.write_text("".join(json.dumps({"id": name, "text": "x"}) + "\n" for name in ("first", "LAST")))
    output = ("--output", str(folder / "r.json"), "--report", str(folder / "r.html"))
    command = ["bench", "--backend", "offline", "--dataset", str(prompts), *output, *arguments]
    return CliRunner().invoke(app, command, env={"COLUMNS": "250"})


def test_three_engines_follow_each_other(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, logs)
    found = invoke(
        logs, "--concurrency", "1,2", "-k", "3", "--dtype", "float32", "--engine-args", '{"max_num_seqs": 8}'
    )
    assert found.exit_code == 0, found.output
    saved = load_results(logs / "r.json")
    summaries, settings = saved.summaries, saved.settings
    assert settings.model is not None and settings.model.endswith("tiny-python/target")
    assert settings.drafter is not None and settings.drafter.endswith("tiny-python/drafter")
    assert (settings.num_speculative_tokens, settings.dtype, settings.engine_args) == (
        3,
        "float32",
        {"max_num_seqs": 8},
    )
    page = (logs / "r.html").read_text()
    assert "tiny-python/drafter" in page and "{&#34;max_num_seqs&#34;: 8}" in page
    assert [(s.system, s.concurrency, s.tokens_per_second, s.speedup) for s in summaries] == [
        ("no speculation", 1, 1.0, None),
        ("no speculation", 2, 1.0, None),
        ("vLLM's own dflash", 1, 2.0, 2.0),
        ("vLLM's own dflash", 2, 2.0, 2.0),
        ("vllm_dflash", 1, 2.0, 2.0),
        ("vllm_dflash", 2, 2.0, 2.0),
    ]
    assert {s.acceptance_length_pooled for s in summaries[2:]} == {2.5}
    assert (logs / "no-speculation.log").read_text() == "this engine's log 0 None None\n"
    own, ours = (logs / "vLLMs-own-dflash.log").read_text(), (logs / "vllm_dflash.log").read_text()
    assert own.startswith("this engine's log 0 /") and own.endswith("drafter 3\n")
    assert ours.startswith("this engine's log 1 /") and ours.endswith("drafter 3\n")


def test_an_engine_that_dies_loses_nothing_and_shows_its_log(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, logs, "sys.exit('out of memory')")
    found = invoke(logs, "--system", "vllm_dflash")
    assert found.exit_code == 1
    assert "out of memory" in found.output
    assert f"vLLM's process ended with exit status 1. Its whole log: {logs}/vllm_dflash.log" in found.output
    (run,) = load_results(logs / "r.json").runs
    assert [record.name for record in run.requests] == ["first"] and run.interrupted
    assert "the last run is not whole" in (logs / "r.html").read_text()


def test_an_engine_that_hangs_is_ended_and_loses_nothing(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline_runs, "SLACK_S", 0.1)
    install(monkeypatch, logs, "time.sleep(60)")
    started = time.monotonic()
    found = invoke(logs, "--system", "vllm_dflash", "--timeout", "0.2", "--warm-up", "3", "--concurrency", "2")
    assert time.monotonic() - started < 30
    assert found.exit_code == 1
    # Two turns of the warm-up and the request itself: 3 x 0.2 s, and 0.1 s.
    assert f"vLLM's process has said nothing for 0.7 s. Its whole log: {logs}/vllm_dflash.log" in found.output
    (run,) = load_results(logs / "r.json").runs
    assert [record.name for record in run.requests] == ["first"] and run.interrupted


def test_a_start_that_hangs_is_ended(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline_runs, "START_S", 0.3)
    monkeypatch.setattr(offline_runs, "CHILD", (sys.executable, "-c", "import time; time.sleep(60)"))
    found = invoke(logs)
    assert found.exit_code == 1
    assert "vLLM's process has said nothing for 0.3 s" in found.output


def test_ctrl_c_keeps_what_the_engine_had_told(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child interrupts its parent, and would go on for a minute."""
    install(monkeypatch, logs, "time.sleep(0.5); os.kill(os.getppid(), signal.SIGINT); time.sleep(60)")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and os.getpid() != 1
    found = invoke(logs)
    assert found.exit_code == 130, found.output
    (run,) = load_results(logs / "r.json").runs
    assert (run.system, [record.name for record in run.requests]) == ("no speculation", ["first"])
