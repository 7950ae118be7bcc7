# SPDX-License-Identifier: Apache-2.0
"""`vllm-dflash bench` against servers on loopback: what it shows and saves, and what it does when all goes wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.unit.bench import fake_server as fakes
from tests.unit.bench.fake_server import Handler, chunk, fake_server
from tests.unit.bench.samples import results
from tests.unit.bench.test_counters import OURS, VLLM
from vllm_dflash.benchmark.results import load_results, save_results
from vllm_dflash.cli import app


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "250"})


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"id": f"p{i}", "text": f"say {i}"}) + "\n" for i in range(4)))
    return str(path)


class Metrics:
    """Counters that grow with every request, by what the samples of test_counters hold."""

    def __init__(self, text: str) -> None:
        self.text, self.server = text, None  # type: ignore[var-annotated]

    def __call__(self) -> str:
        done = len(self.server.requests)
        lines = []
        for line in self.text.replace('"m"', '"fake"').splitlines():
            name, space, value = line.rpartition(" ")
            lines.append(line if line.startswith("#") else f"{name}{space}{float(value) * done}")
        return "\n".join(lines) + "\n"


def test_a_run_is_shown_and_saved_with_the_servers_counters(prompts: str, tmp_path: Path) -> None:
    """Each of 4 requests moves the counters by the sample: 6 drafts with 5 accepted tokens, 64 of 100 tokens cached."""
    metrics = Metrics(VLLM.replace("} 40.0", "} 7.0") + OURS)
    output, report = tmp_path / "results.json", tmp_path / "report.html"
    with fake_server(fakes.answer, metrics) as server:
        metrics.server = server
        found = invoke(
            "--base-url", server.url, "--dataset", prompts, "--concurrency", "1,2",
            "--output", str(output), "--report", str(report),
        )  # fmt: skip
    assert found.exit_code == 0, found.output
    saved = load_results(output)
    assert [(run.system, run.dataset, run.concurrency) for run in saved.runs] == [
        ("server", "own", 1),
        ("server", "own", 2),
    ]
    assert (saved.settings.model, saved.settings.api, saved.settings.drafter) == ("fake", "chat", None)
    for run, summary in zip(saved.runs, saved.summaries, strict=True):
        assert run.counters is not None and run.counters.acceptance is not None
        assert run.counters.acceptance.drafts == 24  # 4 x 6; the warm-up is in neither
        assert summary.acceptance_length_pooled == pytest.approx(1 + 5 / 6)
        assert summary.position_rates == (4 / 6, 2 / 5)  # the third position was never drafted
        assert (summary.output_tokens, summary.prefix_cache_hit_rate, summary.errors) == (28, 0.64, {})
        assert run.notes == ()
    assert "1.83" in found.output and "64.0%" in found.output
    assert "1.83" in report.read_text()
    assert len(server.requests) == 2 * (1 + 4)
    salts = [body["cache_salt"] for _, body in server.requests]
    assert len(set(salts)) == 3  # one for the warm-ups and one for each run


def test_without_own_counters_late_positions_are_said_to_be_biased(prompts: str) -> None:
    metrics = Metrics(VLLM)
    with fake_server(fakes.answer, metrics) as server:
        metrics.server = server
        output = invoke("--base-url", server.url, "--dataset", prompts).output
    assert "late positions are biased low" in output
    assert "its counters hold other traffic too" in output  # 40 tokens a request, and 7 were sent


def test_a_server_without_counters_is_measured_all_the_same(prompts: str) -> None:
    with fake_server(fakes.answer) as server:
        found = invoke("--base-url", server.url, "--dataset", prompts)
    assert found.exit_code == 0
    assert f"no counters from {server.url}/metrics: HTTPStatusError" in found.output


def test_a_second_server_is_the_baseline(prompts: str, tmp_path: Path) -> None:
    def slowly(handler: Handler, body: dict[str, Any]) -> None:
        time.sleep(0.15)
        fakes.answer(handler, body)

    with fake_server(slowly) as slow, fake_server(fakes.answer) as fast:
        found = invoke(
            "--base-url", fast.url, "--baseline-url", slow.url, "--dataset", prompts, "--output", f"{tmp_path}/r.json"
        )
    assert found.exit_code == 0, found.output
    baseline, server = load_results(tmp_path / "r.json").summaries
    assert (baseline.system, baseline.speedup, server.system) == ("baseline", None, "server")
    assert server.speedup is not None and server.speedup > 2
    assert "speed-up over baseline" in found.output


def test_an_earlier_result_is_the_baseline(prompts: str, tmp_path: Path) -> None:
    arguments = ["--dataset", prompts, "--output"]
    with fake_server(fakes.answer) as server:
        assert invoke("--base-url", server.url, *arguments, f"{tmp_path}/old.json").exit_code == 0
        found = invoke(
            "--base-url", server.url, *arguments, f"{tmp_path}/new.json", "--baseline", f"{tmp_path}/old.json"
        )
    assert found.exit_code == 0, found.output
    old, new = load_results(tmp_path / "old.json"), load_results(tmp_path / "new.json")
    speeds = [summary.tokens_per_second or 0.0 for summary in (*new.summaries, *old.summaries)]
    assert new.summaries[0].speedup == pytest.approx(speeds[0] / speeds[1])


def test_all_kinds_of_errors_end_in_a_report(prompts: str, tmp_path: Path) -> None:
    """A request each of: HTTP 500, bad JSON, a timeout, a good answer."""

    def by_prompt(handler: Handler, body: dict[str, Any]) -> None:
        replies = [fakes.error_500, fakes.bad_json, fakes.slow, fakes.answer]
        replies[int(body["messages"][-1]["content"][-1])](handler, body)

    report = tmp_path / "report.html"
    with fake_server(by_prompt) as server:
        found = invoke(
            "--base-url", server.url, "--dataset", prompts, "--concurrency", "4", "--timeout", "0.5", "--warm-up", "0",
            "--report", str(report),
        )  # fmt: skip
    assert found.exit_code == 0
    assert "1 bad_json, 1 http_500, 1 timeout" in found.output
    for kind in ("bad_json", "http_500", "timeout"):
        assert f"<td>{kind}</td>" in report.read_text()


def test_a_server_that_fails_always_ends_in_a_report_and_a_failing_status(prompts: str, tmp_path: Path) -> None:
    with fake_server(fakes.error_500) as server:
        found = invoke("--base-url", server.url, "--dataset", prompts, "--report", f"{tmp_path}/report.html")
    assert found.exit_code == 1
    assert "4 http_500" in found.output
    assert "4 http_500" in (tmp_path / "report.html").read_text()


def test_a_killed_server_ends_in_a_report(prompts: str, tmp_path: Path) -> None:
    """It answers once, then it is gone: in the middle of a stream, for later requests, and for its counters."""

    def die(handler: Handler, body: dict[str, Any]) -> None:
        if body["messages"][-1]["content"] == "say 0":
            fakes.answer(handler, body)
            return
        handler.start_stream()
        handler.event(chunk("a", 1))
        handler.server.server_close()
        handler.connection.close()

    with fake_server(die, lambda: VLLM.replace('"m"', '"fake"')) as server:
        found = invoke(
            "--base-url", server.url, "--dataset", prompts, "--warm-up", "0", "--report", f"{tmp_path}/report.html"
        )
    assert found.exit_code == 0, found.output
    assert "2 connection, 1 truncated" in found.output
    assert "no counters from" in found.output
    assert "2 connection, 1 truncated" in (tmp_path / "report.html").read_text()


def test_ctrl_c_keeps_what_there_is(prompts: str, tmp_path: Path) -> None:
    def second_waits(handler: Handler, body: dict[str, Any]) -> None:
        (fakes.answer if body["messages"][-1]["content"] == "say 0" else fakes.slow)(handler, body)

    output, report = tmp_path / "r.json", tmp_path / "r.html"
    with fake_server(second_waits) as server:
        command = [
            sys.executable, "-m", "vllm_dflash", "bench", "--base-url", server.url, "--dataset", prompts,
            "--concurrency", "2", "--output", str(output), "--report", str(report),
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        deadline = time.monotonic() + 60
        while len(server.requests) < 4 and time.monotonic() < deadline:  # warm-up, the first, and two that wait
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=60)
    assert process.returncode == 130, text
    saved = load_results(output)
    kinds = sorted(record.error.kind if record.error else "done" for record in saved.runs[0].requests)
    assert kinds == ["done", "interrupted", "interrupted"]
    assert saved.interrupted
    assert "Interrupted: the last run is not whole" in text
    assert "Interrupted: the last run is not whole" in report.read_text()


def test_saved_results_are_shown_again(tmp_path: Path) -> None:
    save_results(results(), tmp_path / "r.json")
    found = invoke("--from", f"{tmp_path}/r.json", "--report", f"{tmp_path}/r.html")
    assert found.exit_code == 0, found.output
    assert "2.40x" in found.output
    assert "2.40x" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(("columns", "tables"), [("300", 1), ("120", 2), ("80", 4)])
def test_a_narrow_terminal_gets_several_tables_with_whole_numbers(tmp_path: Path, columns: str, tables: int) -> None:
    save_results(results(), tmp_path / "r.json")
    output = CliRunner().invoke(app, ["bench", "--from", f"{tmp_path}/r.json"], env={"COLUMNS": columns}).output
    assert output.count("┏") == tables
    assert output.count("│ baseline │") == 4 * tables
    for number in ("153.6", "65.0 / 79.7", "3.85", "40.7%"):
        assert number in output


def test_generate_with_a_template_of_the_given_tokenizer(prompts: str) -> None:
    from tests.e2e.engines import TARGET

    def generate(handler: Handler, body: dict[str, Any]) -> None:
        handler.start_stream()
        meta = {"completion_tokens": 5, "prompt_tokens": 4, "finish_reason": {"type": "stop"}, "spec_verify_ct": 2}
        handler.event({"text": "abc", "meta_info": meta})
        handler.event("[DONE]")

    with fake_server(generate) as server:
        found = invoke(
            "--backend", "sglang", "--api", "generate", "--base-url", server.url, "--tokenizer", str(TARGET),
            "--dataset", prompts, "--warm-up", "0",
        )  # fmt: skip
    assert found.exit_code == 0, found.output
    path, body = server.requests[0]
    assert path == "/generate"
    assert "say 0" in body["text"] and body["text"] != "say 0"
    assert "2.00" in found.output  # one token of the prefill, then two steps of two


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--concurrency", "1,x"], "--concurrency 1,x: whole numbers from 1 on"),
        (["--concurrency", "0"], "--concurrency 0: whole numbers from 1 on"),
        (["--dataset-revision", "gsm8k"], "--dataset-revision gsm8k: NAME=COMMIT is needed"),
        (["--dataset-revision", "gsm8k=x"], "--dataset-revision gsm8k=...: no --dataset gsm8k was given"),
        (["--dataset", "gsm9k"], "--dataset gsm9k: not a .jsonl file"),
        (["--raw", "--no-thinking"], "--thinking and --no-thinking need --chat"),
        (["--api", "generate"], "--api generate: is SGLang's, and --backend is vllm"),
        (["--base-url", "localhost:8000"], "--base-url localhost:8000: a URL that begins with http"),
        (["--target", "x"], "--target x: a running server has its own"),
        (["--backend", "offline", "--base-url", "http://x"], "--base-url http://x: only a server has one"),
        (["--backend", "transformers", "--concurrency", "1,8"], "--concurrency 1,8: --backend transformers runs 1"),
        (["--backend", "transformers", "-k", "3"], "--num-speculative-tokens: --backend transformers drafts whole"),
        (["--engine-args", "{}", "--engine-args", "{"], "--engine-args {: not JSON"),
        (["--engine-args", "[]"], "--engine-args []: a JSON object is needed"),
        (["--engine-args", '{"a": 1}'], "--engine-args: are vLLM's LLM(...)'s, and --backend is vllm"),
        (["--backend", "offline", "--engine-args", '{"seed": 1}'], "--engine-args: seed is set by the benchmark"),
        (["--output", "/nowhere/r.json"], "--output /nowhere/r.json: there is no directory /nowhere"),
        (["--report", "/"], "--report /: is a directory"),
        (["--baseline", "none.json"], "none.json: cannot be read"),
        (["--from", "none.json"], "none.json: cannot be read"),
        (["--base-url", "http://127.0.0.1:9"], "--base-url http://127.0.0.1:9: http://127.0.0.1:9/v1/models"),
        (["--baseline-url", "http://x", "--baseline", "r.json"], "--baseline-url and --baseline exclude each other"),
    ],
)
def test_bad_options_are_named(arguments: list[str], error: str) -> None:
    found = invoke(*arguments)
    assert found.exit_code == 1
    assert error in found.output
    assert found.output.count("\n") == 1
