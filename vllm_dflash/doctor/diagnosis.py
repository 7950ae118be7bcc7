# SPDX-License-Identifier: Apache-2.0
"""From a pair's names to findings: read the files, run every check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_dflash.doctor.checks import run_checks
from vllm_dflash.doctor.facts import Asked, Facts
from vllm_dflash.doctor.finding import Finding, error
from vllm_dflash.doctor.hub import locate
from vllm_dflash.doctor.machine import read_machine
from vllm_dflash.doctor.reading import UnreadableError, read_drafter, read_target
from vllm_dflash.engine_facts import EngineFacts

#: A target's architectures -> what the installed vLLM can do with it.
AskEngine = Callable[[Sequence[str]], EngineFacts]


@dataclass(frozen=True)
class Diagnosis:
    """facts: None where a model could not be read; the findings then say why."""

    findings: tuple[Finding, ...]
    facts: Facts | None = None


def diagnose(target: str, drafter: str, asked: Asked, ask_engine: AskEngine) -> Diagnosis:
    """Look at a pair's files. Nothing is raised for what they say."""
    unreadable: list[Finding] = []

    def attempt(read: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except UnreadableError as problem:
            unreadable.append(error("unreadable", str(problem), "name the directory of a model, or its hub id"))
            return None

    places = {flag: attempt(locate, flag, model) for flag, model in (("--target", target), ("--draft", drafter))}
    if unreadable:
        return Diagnosis(tuple(unreadable))
    of_target = attempt(read_target, "--target", target, *places["--target"])
    if of_target is None:
        return Diagnosis(tuple(unreadable))
    of_drafter = attempt(read_drafter, "--draft", drafter, places["--draft"][0], of_target, places["--draft"][1])
    if of_drafter is None:
        return Diagnosis(tuple(unreadable))
    facts = Facts(of_target, of_drafter, asked, ask_engine(of_target.architectures), read_machine())
    # The report names the drafter once; the start-up checks, which share these messages, name it in each.
    findings = (replace(one, seen=one.seen.removeprefix(f"{drafter}: ")) for one in run_checks(facts))
    return Diagnosis(tuple(findings), facts)
