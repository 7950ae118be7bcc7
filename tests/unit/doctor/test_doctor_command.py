# SPDX-License-Identifier: Apache-2.0
"""The command: its screen, its exit codes for bad input, what it imports, how long it takes."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

from vllm_dflash.benchmark.metrics import AcceptanceCounts
from vllm_dflash.benchmark.prompts import load_prompts
from vllm_dflash.cli import app
from vllm_dflash.console import SHIPPED_PAIR
from vllm_dflash.doctor import command
from vllm_dflash.doctor.command import DoctorOptions, run_doctor
from vllm_dflash.doctor.finding import error, exit_code, info, ok, warning
from vllm_dflash.doctor.measurement import Measurement, Run
from vllm_dflash.doctor.report import Report, as_json, show
from vllm_dflash.engine_facts import EngineFacts

HEAVY = ("torch", "transformers", "vllm")
PROBE = f"""
import sys
from typer.testing import CliRunner
from vllm_dflash.cli import app
result = CliRunner().invoke(app, ["doctor"])
print(result.exit_code, [name for name in {HEAVY!r} if name in sys.modules])
"""


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "100"})


def test_it_is_quick_and_imports_nothing_heavy() -> None:
    started = time.monotonic()
    child = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=60, env=os.environ)
    assert child.stdout.strip() == "0 []", child.stderr
    assert time.monotonic() - started < 10


def test_a_directory_that_is_not_there() -> None:
    result = invoke("--target", "/no/such/target", "--draft", "/no/such/draft")
    assert result.exit_code == 2
    for flag, path in (("--target", "/no/such/target"), ("--draft", "/no/such/draft")):
        assert f"{flag}: there is no directory {path}" in result.output


def test_unreadable_input_is_json_too() -> None:
    result = invoke("--target", "/no/such/target", "--draft", "/no/such/draft", "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["exit_code"], report["verdict"]) == (2, 2, "error")
    assert [one["id"] for one in report["findings"]] == ["unreadable", "unreadable"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "/x"), "--target and --draft go together"),
        (("--prompts", "p.jsonl"), "--prompts p.jsonl is for --run N"),
        (("--run", "1", "--prompts", "/no/p.jsonl"), "--prompts: there is no file /no/p.jsonl"),
    ],
)
def test_options_that_do_not_go_together(arguments: tuple[str, ...], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("content", "message"), [("", "holds no prompts"), ("{}\n", ":1: not a prompt with an id and a text")]
)
def test_prompts_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content, encoding="utf-8")
    result = invoke("--run", "2", "--prompts", str(file))
    assert result.exit_code == 2
    assert message in result.output.replace("\n", "")


def test_the_shipped_prompts_are_prompts() -> None:
    prompts = load_prompts(command._OWN_PROMPTS, 100)
    assert len({prompt.name for prompt in prompts}) == len(prompts) >= 8
    assert all(prompt.text for prompt in prompts)


def test_exit_codes() -> None:
    assert exit_code([]) == exit_code([ok("a", ""), info("b", "")]) == 0
    assert exit_code([ok("a", ""), warning("b", "", "")]) == 1
    assert exit_code([error("a", "", ""), warning("b", "", "")]) == 2


REPORT = Report(
    "T",
    "D",
    (ok("fine", "all well"), info("note", "a note"), warning("slow", "it is slow", "hurry"), error("bad", "no", "fix")),
    Measurement(
        (Run((1, 3), 0, "default", AcceptanceCounts(4, 12, 6, (4, 2, 0)), (2, 2)),), 2, 64, "cpu", "float32", 3.21
    ),
)


def test_the_verdict_comes_first_then_what_to_change() -> None:
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    show(REPORT, console)
    lines = [line.strip() for line in console.export_text().splitlines() if line.strip()]
    assert lines[0].startswith(
        "✗ this pair does not work as it is, acceptance length 2.50  (1 error, 1 warning, 1 note, 1 c"
    )
    order = ["To change", "✗ bad  no", "→ fix", "! slow it is slow", "→ hurry", "To know", "Checked", "✓ fine all well"]
    positions = [next(i for i, line in enumerate(lines) if line.startswith(start)) for start in order]
    assert positions == sorted(positions)
    # 1 + 6/4; 6 of 12; positions 4, 2 and 0 of 4.
    (row,) = (line for line in lines if "as given" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["as given [1, 3]", "default", "2.50", "50.0%", "4"]
    assert [line.split()[-1] for line in lines[-3:]] == ["100%", "50%", "0%"]


def test_the_json_shape() -> None:
    report = as_json(REPORT)
    assert report["findings"][3] == {"id": "bad", "severity": "error", "seen": "no", "change": "fix"}
    assert report["findings"][0]["change"] is None
    assert (report["verdict"], report["exit_code"], report["target"], report["drafter"]) == ("error", 2, "T", "D")
    (run,) = report["measurement"]["runs"]
    assert run == {
        "target_layer_ids": [1, 3],
        "shift": 0,
        "mode": "default",
        "drafts": 4,
        "acceptance_length": 2.5,
        "acceptance_rate": 0.5,
        "position_rates": [1.0, 0.5, 0.0],
    }


def run_the_pair(target: str | None = None) -> tuple[int, dict]:
    """The exit code and the JSON report of a run of one prompt, by default with the shipped pair."""
    drafter, out = target and str(SHIPPED_PAIR / "drafter"), io.StringIO()
    options = DoctorOptions(target, drafter, num_prompts=1, max_new_tokens=4, as_json=True)
    code = run_doctor(options, lambda architectures: EngineFacts(), Console(file=out), Console(file=io.StringIO()))
    return code, json.loads(out.getvalue())


def measurements(report: dict) -> list[tuple[str, str]]:
    return [(one["severity"], one["seen"]) for one in report["findings"] if one["id"] == "measurement"]


def measuring_raises(problem: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: object) -> None:
        raise problem

    monkeypatch.setattr("vllm_dflash.doctor.measure.measure", measure)


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (ValueError("no tensors"), "ValueError: no tensors"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "RuntimeError: mat1 and mat2 shapes"),
        (KeyError("rope_theta"), "KeyError: 'rope_theta'"),
        (IndexError("index out of range in self"), "IndexError: index out of range"),
        (ImportError("needs tiktoken"), "ImportError: needs tiktoken"),
    ],
    ids=["value", "memory", "shapes", "key", "index", "import"],
)
def test_a_pair_that_cannot_be_run_keeps_the_other_findings(
    problem: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring_raises(problem, monkeypatch)
    code, report = run_the_pair()
    ((severity, seen),) = measurements(report)
    assert (code, severity, report["measurement"]) == (2, "error", None)
    assert told in seen
    assert "memory" in {one["id"] for one in report["findings"]}


def test_a_chat_template_that_refuses_keeps_the_other_findings(tmp_path: Path) -> None:
    for file in (SHIPPED_PAIR / "target").iterdir():
        (tmp_path / file.name).symlink_to(file)
    template = tmp_path / "chat_template.jinja"
    template.unlink(missing_ok=True)
    template.write_text("{{ raise_exception('a system message is needed') }}", encoding="utf-8")
    code, report = run_the_pair(str(tmp_path))
    assert code == 2
    ((severity, seen),) = measurements(report)
    assert severity == "error"
    assert "TemplateError: a system message is needed" in seen
    assert "memory" in {one["id"] for one in report["findings"]}


def test_an_interrupted_measurement_keeps_the_other_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    measuring_raises(KeyboardInterrupt(), monkeypatch)
    code, report = run_the_pair()
    assert (code, report["measurement"]) == (130, None)
    assert measurements(report) == [("info", "interrupted: nothing was measured")]
    assert "memory" in {one["id"] for one in report["findings"]}
