# SPDX-License-Identifier: Apache-2.0
"""`vllm-dflash doctor`: what the command line gives to the checks, and what it shows."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from vllm_dflash.benchmark.job import Prompt
from vllm_dflash.benchmark.prompts import load_prompts
from vllm_dflash.console import INTERRUPTED, SHIPPED_PAIR, CommandError
from vllm_dflash.doctor.diagnosis import AskEngine, diagnose
from vllm_dflash.doctor.facts import Asked, Facts
from vllm_dflash.doctor.finding import Finding, error, exit_code, info
from vllm_dflash.doctor.measurement import Measurement, findings_of
from vllm_dflash.doctor.report import Report, as_json, show

#: What loading and running raise for models that are broken, do not go together or do not fit: memory that runs out and
#: shapes that differ are RuntimeErrors, ids beyond a table IndexErrors, missing config keys any of the next three.
_OF_A_BROKEN_PAIR = (ValueError, OSError, RuntimeError, LookupError, TypeError, AttributeError, ImportError)
_OWN_PROMPTS = Path(__file__).with_name("prompts.jsonl")


@dataclass(frozen=True)
class DoctorOptions:
    """The command's options. target and drafter None: the shipped pair. num_prompts None: files only."""

    target: str | None = None
    drafter: str | None = None
    asked: Asked = Asked()
    num_prompts: int | None = None
    prompts: Path | None = None
    max_new_tokens: int = 128
    as_json: bool = False


def run_doctor(options: DoctorOptions, ask_engine: AskEngine, out: Console, err: Console) -> int:
    """Show the report; returns the exit code, after Ctrl-C in a measurement 130.

    Raises CommandError for options that do not go together.
    """
    target, drafter = _pair(options)
    prompts = _prompts(options, target)
    found = diagnose(target, drafter, options.asked, ask_engine)
    findings, measurement, interrupted = list(found.findings), None, False
    if prompts and found.facts is not None:
        try:
            with err.status("measuring", spinner="dots") as status:
                told, measurement = _measure(found.facts, prompts, options.max_new_tokens, status.update)
        except KeyboardInterrupt:
            interrupted, told = True, [info("measurement", "interrupted: nothing was measured")]
        measured = {one.id for one in told}
        # What was measured says more than what the files let expect.
        findings = [one for one in findings if one.id != "thinking" or "thinking" not in measured] + told
    report = Report(target, drafter, tuple(findings), measurement)
    if options.as_json:
        out.print(json.dumps(as_json(report), indent=2), markup=False, highlight=False, soft_wrap=True)
    else:
        show(report, out)
    return INTERRUPTED if interrupted else exit_code(report.findings)


def _pair(options: DoctorOptions) -> tuple[str, str]:
    if (options.target is None) != (options.drafter is None):
        raise CommandError("--target and --draft go together: a drafter only works with the target it was trained on")
    return options.target or str(SHIPPED_PAIR / "target"), options.drafter or str(SHIPPED_PAIR / "drafter")


def _prompts(options: DoctorOptions, target: str) -> tuple[Prompt, ...]:
    if options.num_prompts is None:
        if options.prompts is not None:
            raise CommandError(f"--prompts {options.prompts} is for --run N, which is not given")
        return ()
    held_out, is_shipped = SHIPPED_PAIR / "heldout.jsonl", Path(target).resolve() == (SHIPPED_PAIR / "target").resolve()
    file = options.prompts or (held_out if is_shipped and held_out.is_file() else _OWN_PROMPTS)
    if not file.is_file():
        raise CommandError(f"--prompts: there is no file {file}")
    try:
        prompts = load_prompts(file, options.num_prompts, with_token_ids=is_shipped)
    except ValueError as problem:
        raise CommandError(f"--prompts: {problem}") from problem
    if not prompts:
        raise CommandError(f"--prompts: {file} holds no prompts")
    return prompts


def _measure(
    facts: Facts, prompts: tuple[Prompt, ...], max_new_tokens: int, tell: Callable[[str], None]
) -> tuple[list[Finding], Measurement | None]:
    """Findings of a run of the pair, or the one that says why there was none."""
    id = "measurement"
    if importlib.util.find_spec("torch") is None:
        return [error(id, "--run needs torch, which is not installed", "pip install 'vllm-dflash[hf]'")], None
    from jinja2 import TemplateError  # torch brings it

    try:
        from transformers.utils.logging import disable_progress_bar

        from vllm_dflash.doctor.measure import measure

        disable_progress_bar()
        measurement = measure(facts, prompts, max_new_tokens, tell)
    except (*_OF_A_BROKEN_PAIR, TemplateError) as problem:
        seen = f"the pair could not be run: {type(problem).__name__}: {problem}"
        return [error(id, seen, "put right what the other findings say")], None
    return list(findings_of(measurement)), measurement
