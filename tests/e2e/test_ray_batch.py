# SPDX-License-Identifier: Apache-2.0
"""examples/ray_batch on a Ray cluster of this machine, killed twice and run again.

One job is told as a story: its engine is killed, then the job itself, and the same command is given again. The texts
are compared with those of an engine without speculation.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoTokenizer

from tests.e2e.engines import PAIR, ROOT, TARGET, environment, run_engine

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(1500),  # the first test waits for all of the story
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'vllm-dflash[ray]'"),
]

BATCH = ROOT / "examples" / "ray_batch" / "batch.py"
NUM_ROWS, ROWS_PER_SHARD, MAX_TOKENS = 25, 2, 300
NUM_SHARDS = 13
TOO_LONG = 4  # the row, from 0, whose prompt is beyond the model's 1024 tokens
ENGINE_ARGS = {"dtype": "float32", "enforce_eager": True}
TIMEOUT_S = 480


@dataclass
class Story:
    """What was there before the second run, and what there is after it."""

    command: list[str]
    env: dict[str, str]
    output: Path
    engines_left: list[psutil.Process]
    first_shards: dict[str, tuple[int, int]]
    second_log: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.output / "completions.jsonl").read_text().splitlines()]

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.output / "summary.json").read_text())


def chat_prompts() -> list[dict[str, Any]]:
    """The first held-out ones that are a user's message: `text`, and `prompt_token_ids` as the template makes it."""
    records = [json.loads(line) for line in (PAIR / "heldout.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "chat"][:NUM_ROWS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray_batch")


@pytest.fixture(scope="module")
def ray_files() -> Iterator[str]:
    """Of a short path: Ray's sockets lie in it. An agent of Ray's that ends late may still write there."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as path:
        yield path


@pytest.fixture(scope="module")
def story(folder: Path, ray_files: str) -> Story:
    rows = [{"id": record["id"], "prompt": record["text"]} for record in chat_prompts()]
    rows[TOO_LONG]["prompt"] = "x = 1\n" * 3000
    prompts, output = folder / "prompts.jsonl", folder / "out"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        sys.executable, str(BATCH), "--address", "local", "--input", str(prompts), "--output", str(output),
        "--rows-per-shard", str(ROWS_PER_SHARD), "--max-tokens", str(MAX_TOKENS),
        "--sampling", '{"ignore_eos": true}', "--engine-args", json.dumps(ENGINE_ARGS),
    ]  # fmt: skip
    env = environment(
        RAY_TMPDIR=ray_files,
        RAY_USAGE_STATS_ENABLED="0",
        RAY_AUTH_MODE="disabled",  # or it writes a token into the home directory
        RAY_raylet_start_wait_time_s="180",  # 30 are too few on a busy machine
    )
    with job(command, env, folder / "first.log") as (driver, family):
        wait_for(driver, folder / "first.log", lambda: len(shards_of(output)) >= 1)
        first_engine = processes_of_engine(driver)
        first_engine[0].kill()
        wait_for(driver, folder / "first.log", lambda: len(shards_of(output)) >= 3)
        second_engine = processes_of_engine(driver)
        family += psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        driver.wait(TIMEOUT_S)
        _, alive = psutil.wait_procs(first_engine + second_engine, timeout=120)
        family += alive
    first_shards = shards_of(output)
    with job(command, env, folder / "second.log") as (driver, family):
        status = driver.wait(TIMEOUT_S)
    second_log = (folder / "second.log").read_text()
    assert status == 0, second_log[-3000:]
    return Story(command, env, output, alive, first_shards, second_log)


@contextlib.contextmanager
def job(
    command: list[str], env: dict[str, str], log: Path
) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """The driver and a list for its children's processes; all of them are ended when the block is left."""
    with log.open("w") as stream:
        driver = subprocess.Popen(command, env=env, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL)
    family: list[psutil.Process] = []
    try:
        yield driver, family
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        driver.wait(TIMEOUT_S)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def processes_of_engine(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The actor, and what it may have started."""
    children = psutil.Process(driver.pid).children(recursive=True)
    (actor,) = (child for child in children if title_of(child).startswith("ray::MapWorker"))
    return [actor, *actor.children(recursive=True)]


def title_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):  # it has just ended
        return " ".join(process.cmdline())
    return ""


def shards_of(output: Path) -> dict[str, tuple[int, int]]:
    """By name: what changes when a file is written anew."""
    files = sorted((output / "shards").glob("*.json"))
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def wait_for(driver: subprocess.Popen[bytes], log: Path, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        ended = driver.poll() is not None
        assert not ended and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)


def test_texts_are_those_of_an_engine_without_speculation(story: Story, folder: Path) -> None:
    prompts = [record["prompt_token_ids"] for record in chat_prompts()]
    del prompts[TOO_LONG]
    run = {"name": "greedy", "prompts": prompts, "max_tokens": MAX_TOKENS}
    plain = run_engine(folder / "plain", {"model": str(TARGET), **ENGINE_ARGS}, [run])["greedy"]
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    expected = [tokenizer.decode(ids, skip_special_tokens=True) for ids in plain.token_ids]
    answered = [row for row in story.rows if "error" not in row]
    assert [row["text"] for row in answered] == expected
    assert [row["prompt_tokens"] for row in answered] == [len(ids) for ids in prompts]


def test_each_row_is_there_once_and_in_order(story: Story) -> None:
    assert [(row["line"], row["id"]) for row in story.rows] == [
        (number, record["id"]) for number, record in enumerate(chat_prompts(), start=1)
    ]


def test_shards_that_were_done_are_not_computed_again(story: Story) -> None:
    there = len(story.first_shards)
    assert 3 <= there < NUM_SHARDS, "killed halfway"
    assert f"{there} of {NUM_SHARDS} shards are there already" in story.second_log
    after = shards_of(story.output)
    assert len(after) == NUM_SHARDS
    assert {name: after[name] for name in story.first_shards} == story.first_shards


def test_no_process_of_a_killed_engine_or_job_stays(story: Story) -> None:
    assert story.engines_left == []


def test_a_row_that_fails_is_told_and_counted(story: Story) -> None:
    failed = story.rows[TOO_LONG]
    assert "maximum context length is 1024 tokens" in failed["error"]
    assert set(failed) == {"line", "id", "error"}
    assert (story.summary["rows"], story.summary["failed"]) == (NUM_ROWS, 1)
    assert story.summary["output_tokens"] == (NUM_ROWS - 1) * MAX_TOKENS


def test_counters_of_the_job_are_those_of_its_rows(story: Story) -> None:
    """vLLM counts drafts for each request and, elsewhere, for the engine: the rows once each make up the job."""
    answered = [row for row in story.rows if "error" not in row]
    counters = story.summary["counters"]
    for field in ("drafts", "drafted_tokens", "accepted_tokens"):
        assert counters[field] == sum(row[field] for row in answered) > 0
    pooled = 1 + counters["accepted_tokens"] / counters["drafts"]
    assert story.summary["acceptance_length_pooled"] == pytest.approx(pooled)
    lengths = [1 + row["accepted_tokens"] / row["drafts"] for row in answered]
    assert [row["acceptance_length"] for row in answered] == pytest.approx(lengths)
    assert story.summary["acceptance_length_mean_of_rows"] == pytest.approx(sum(lengths) / len(lengths))
    assert pooled > 2, "the shipped drafter's"


def test_a_finished_job_starts_no_engine(story: Story) -> None:
    before = shards_of(story.output)
    done = subprocess.run(story.command, env=story.env, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0 and f"{NUM_SHARDS} of {NUM_SHARDS} shards are there already" in done.stdout
    assert done.stderr == "" and shards_of(story.output) == before
