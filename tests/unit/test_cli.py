# SPDX-License-Identifier: Apache-2.0
"""The command without an engine: usage, clear errors, and what the demo makes of two engines' results."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vllm_dflash import __version__, console
from vllm_dflash.benchmark.job import EngineJob, EngineResult, Prompt, Ready, Response
from vllm_dflash.benchmark.metrics import AcceptanceCounts
from vllm_dflash.cli import app

PROMPT = '{"id": "p0", "kind": "code", "text": "x = ", "prompt_token_ids": [1, 2], "source": "handmade"}\n'
COUNTS = AcceptanceCounts(drafts=2, drafted_tokens=6, accepted_tokens=3, accepted_per_position=(2, 1, 0))


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120"})


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shipped pair as far as the parent process looks at it."""
    for name in ("target", "drafter"):
        (tmp_path / name).mkdir()
    (tmp_path / "heldout.jsonl").write_text(PROMPT, encoding="utf-8")
    monkeypatch.setattr(console, "SHIPPED_PAIR", tmp_path)
    monkeypatch.setattr("vllm_dflash.demo.SHIPPED_PAIR", tmp_path)
    monkeypatch.setattr(console, "require_vllm", lambda: None)
    return tmp_path


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[EngineJob]]:
    """Replaces the engine child: the speculating engine generates the given token ids, the other one [5, 6]."""

    def install(dflash_token_ids: tuple[int, ...]) -> list[EngineJob]:
        jobs: list[EngineJob] = []

        def run_engine(job: EngineJob, log: Path, on_message: Callable[[Ready | Response], None]) -> EngineResult:
            jobs.append(job)
            token_ids, seconds = (dflash_token_ids, 1.0) if job.drafter else ((5, 6), 2.0)
            responses = tuple(Response(prompt, "y = 1", token_ids, seconds) for prompt in job.prompts)
            return EngineResult(3.0, responses, COUNTS if job.drafter else None)

        monkeypatch.setattr(console, "run_engine", run_engine)
        return jobs

    return install


def test_help_lists_only_what_works() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert {"bench", "collect", "demo", "doctor", "generate", "top", "train"} == {
        command.callback.__name__ for command in app.registered_commands if command.callback
    }


def test_version() -> None:
    assert invoke("--version").output.strip() == __version__


def test_a_missing_pair_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "SHIPPED_PAIR", tmp_path / "nowhere")
    result = invoke("generate", "x = ")
    assert result.exit_code == 1
    assert f"--target: there is no directory {tmp_path}/nowhere/target" in result.output


def test_missing_prompts_are_named(pair: Path) -> None:
    (pair / "heldout.jsonl").unlink()
    result = invoke("demo", "-k", "3")
    assert result.exit_code == 1
    assert f"there is no file {pair}/heldout.jsonl" in result.output


def test_target_and_drafter_go_together(pair: Path) -> None:
    result = invoke("demo", "--target", str(pair / "target"))
    assert result.exit_code == 1
    assert "--target and --drafter go together" in result.output


def test_a_drafter_without_config_is_named(pair: Path) -> None:
    result = invoke("demo")
    assert result.exit_code == 1
    assert f"no config.json in the drafter's directory {pair}/drafter" in result.output


def test_demo_runs_both_engines_on_the_same_work(pair: Path, engines: Callable[..., list[EngineJob]]) -> None:
    jobs = engines((5, 6))
    assert invoke("demo", "-k", "3", "--max-tokens", "9").exit_code == 0
    plain, speculating = jobs
    assert (plain.drafter, plain.num_speculative_tokens) == (None, None)
    assert (speculating.drafter, speculating.num_speculative_tokens) == (str(pair / "drafter"), 3)
    assert plain.prompts == speculating.prompts == (Prompt("p0", "x = ", (1, 2)),)
    assert plain.max_tokens == speculating.max_tokens == 9
    assert plain.temperature == speculating.temperature == 0.0


def test_demo_shows_the_comparison(pair: Path, engines: Callable[..., list[EngineJob]]) -> None:
    engines((5, 6))
    output = invoke("demo", "-k", "3").output
    assert "identical to no speculation" in output
    for row, (plain, dflash) in {
        "output tokens/s": ("1.0", "2.0"),
        "speed-up": ("1.00 x", "2.00 x"),
        "mean acceptance length": ("-", "2.50"),
        "acceptance rate": ("-", "50.0%"),
        "token ids identical": ("-", "1 of 1 prompts"),
    }.items():
        (line,) = (line for line in output.splitlines() if row in line)
        cells = [cell.strip() for cell in line.split("│")]
        assert cells[2] == plain
        assert cells[3].startswith(dflash)
    for rate in ("100%", "50%", "0%"):
        assert rate in output


def test_demo_fails_when_token_ids_differ(pair: Path, engines: Callable[..., list[EngineJob]]) -> None:
    engines((5, 9))
    result = invoke("demo", "-k", "3")
    assert result.exit_code == 1
    assert "differs from no speculation at output token 1" in result.output
    assert "0 of 1 prompts" in result.output


def test_generate_prints_the_text_alone_on_stdout(pair: Path, engines: Callable[..., list[EngineJob]]) -> None:
    jobs = engines((5, 6))
    result = invoke("generate", "a = ", "b = ", "-k", "3", "--temperature", "0.7", "--raw")
    assert result.exit_code == 0
    assert result.stdout == "y = 1\ny = 1\n"
    assert "mean acceptance length" in result.stderr
    (job,) = jobs
    assert ([prompt.text for prompt in job.prompts], job.temperature, job.chat) == (["a = ", "b = "], 0.7, False)
