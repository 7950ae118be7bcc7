# SPDX-License-Identifier: Apache-2.0
"""Nothing measured is lost: not by an error, and not by a file that cannot be written."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.unit.bench import fake_server as fakes
from tests.unit.bench.fake_server import fake_server
from tests.unit.bench.samples import results
from vllm_dflash import bench, bench_outputs
from vllm_dflash.bench_backends import Display, Plan
from vllm_dflash.benchmark.records import Run
from vllm_dflash.benchmark.results import load_results
from vllm_dflash.cli import app


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "250"})


def full(results: Any, path: Path) -> None:
    raise OSError(28, "No space left on device")


def test_an_unforeseen_error_keeps_the_runs_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def runs(display: Display) -> Generator[Run, None, None]:
        yield results().runs[0]
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bench, "planned_runs", lambda options, sets: Plan(runs, "model"))
    found = invoke("--output", f"{tmp_path}/r.json", "--report", f"{tmp_path}/r.html")
    assert isinstance(found.exception, RuntimeError) and str(found.exception) == "out of memory"
    assert "baseline" in found.output and "64.0" in found.output  # 4 x 64 tokens in 4 s
    assert load_results(tmp_path / "r.json").runs == (results().runs[0],)
    assert (tmp_path / "r.html").stat().st_size > 1000
    monkeypatch.setattr(bench_outputs, "_write_report", full)
    found = invoke("--report", f"{tmp_path}/r.html")
    assert isinstance(found.exception, RuntimeError)
    assert f"--report {tmp_path}/r.html: cannot be written: No space left on device" in found.output


def test_a_file_that_cannot_be_written_is_named_and_the_page_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_outputs, "save_results", full)
    with fake_server(fakes.answer) as server:
        found = invoke(
            "--base-url",
            server.url,
            "--num-prompts",
            "1",
            "--output",
            f"{tmp_path}/r.json",
            "--report",
            f"{tmp_path}/r.html",
        )
    assert found.exit_code == 1
    assert f"--output {tmp_path}/r.json: cannot be written: No space left on device" in found.output
    assert "tokens/s" in found.output
    assert (tmp_path / "r.html").stat().st_size > 1000


def test_two_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.jsonl").write_text('{"text": "x"}\n')
    one, other = f"{tmp_path}/a/own.jsonl", f"{tmp_path}/b/own.jsonl"
    found = invoke("--dataset", one, "--dataset", other)
    assert found.exit_code == 1
    assert f"--dataset {one} --dataset {other}: both are called own" in found.output
