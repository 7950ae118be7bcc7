# SPDX-License-Identifier: Apache-2.0
"""A benchmark's outcome as one JSON file: everything that the tables and the report are made of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vllm_dflash.benchmark.measures import Summary, summarise
from vllm_dflash.benchmark.records import Run
from vllm_dflash.files import write_whole

FORMAT: Literal["vllm-dflash-bench/1"] = "vllm-dflash-bench/1"


@dataclass(frozen=True)
class Settings:
    """What the requests asked for. thinking None: not said, so the server's template decides."""

    backend: str
    max_tokens: int
    temperature: float
    top_p: float
    thinking: bool | None
    chat: bool
    num_prompts: int | None
    warm_up: int
    seed: int
    timeout_seconds: float


@dataclass(frozen=True)
class PromptSetInfo:
    """Where a prompt set came from. revision: the commit of a hub's data set that was read."""

    name: str
    source: str
    revision: str | None
    prompts: int


@dataclass(frozen=True)
class Results:
    """baseline: the system that speed-ups are relative to, if it is among the runs or was read from another file."""

    created: str
    command: str
    environment: dict[str, str]
    settings: Settings
    prompt_sets: tuple[PromptSetInfo, ...]
    runs: tuple[Run, ...]
    baseline: str | None = None
    baseline_runs: tuple[Run, ...] = ()
    notes: tuple[str, ...] = ()
    format: Literal["vllm-dflash-bench/1"] = FORMAT

    @property
    def interrupted(self) -> bool:
        return any(run.interrupted for run in self.runs)

    @property
    def summaries(self) -> tuple[Summary, ...]:
        """One for each run, in the order they ran, speed-ups included."""
        reference = {
            (run.dataset, run.concurrency): run
            for run in (*self.runs, *self.baseline_runs)
            if run.system == self.baseline
        }
        return tuple(
            summarise(run, None if run.system == self.baseline else reference.get((run.dataset, run.concurrency)))
            for run in self.runs
        )


def save_results(results: Results, path: Path) -> None:
    """Write the whole file, or leave what was there. Its summaries are for readers: loading works them out anew."""
    content = asdict(results) | {"summaries": [asdict(summary) for summary in results.summaries]}
    write_whole(path, json.dumps(content, indent=1) + "\n")


def load_results(path: Path) -> Results:
    """Raises ValueError naming the file and the key that is missing or wrong."""
    from pydantic import TypeAdapter, ValidationError

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    _check_format(content, path)
    content.pop("summaries", None)
    try:
        loaded: Results = TypeAdapter(Results).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: {key}: {first['msg']}; the value: {str(first['input'])[:80]}") from error
    return loaded


def _check_format(content: Any, path: Path) -> None:
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: format = {found!r}: not a result of vllm-dflash bench --output ({FORMAT})")


def with_baseline(results: Results, other: Results, path: str) -> Results:
    """`results` with speed-ups over another run's results. Raises ValueError if those hold several systems."""
    systems = sorted({run.system for run in other.runs})
    name = other.baseline if other.baseline in systems else systems[0] if len(systems) == 1 else None
    if name is None:
        raise ValueError(f"--baseline {path}: holds runs of {', '.join(systems) or 'nothing'}: one system is needed")
    label = f"{name} ({path})"
    runs = tuple(replace(run, system=label) for run in other.runs if run.system == name)
    return replace(
        results,
        baseline=label,
        baseline_runs=runs,
        notes=(*results.notes, *_differences(results, other, path, "The baseline")),
    )


def _differences(results: Results, other: Results, path: str, who: str) -> Iterable[str]:
    """What makes a comparison unfair, one sentence each."""
    theirs = asdict(other.settings)
    for key, value in asdict(results.settings).items():
        if key not in ("warm_up", "timeout_seconds") and theirs[key] != value:
            yield f"{who} in {path} used {key} = {theirs[key]}, these runs used {value}."
    revisions = {info.name: (info.revision, info.prompts) for info in other.prompt_sets}
    for info in results.prompt_sets:
        if info.name in revisions and revisions[info.name] != (info.revision, info.prompts):
            yield f"{who} in {path} used other prompts of {info.name}."


def merged_results(loaded: Sequence[tuple[Results, str]]) -> Results:
    """Several results as one, the first one's settings leading. A run that two files have gets its file's name."""
    (first, _), *_ = loaded
    if len(loaded) == 1:
        return first
    seen: dict[tuple[str, str, int], str] = {}
    runs: list[Run] = []
    notes = [note for results, _ in loaded for note in results.notes]
    for results, path in loaded:
        for run in results.runs:
            key = (run.system, run.dataset, run.concurrency)
            clash = seen.setdefault(key, path) != path
            runs.append(replace(run, system=f"{run.system} ({Path(path).stem})") if clash else run)
        notes += _differences(first, results, path, "The run")
    prompt_sets = {info.name: info for results, _ in reversed(loaded) for info in results.prompt_sets}
    baselines = [results for results, _ in loaded if results.baseline]
    if len(names := dict.fromkeys(str(results.baseline) for results in baselines)) > 1:
        notes.append(
            f"Speed-ups are over {next(iter(names))} in all of these results, not over {', '.join(names)} each."
        )
    return replace(
        first,
        runs=tuple(runs),
        notes=tuple(dict.fromkeys(notes)),
        prompt_sets=tuple(reversed(prompt_sets.values())),
        baseline=baselines[0].baseline if baselines else None,
        baseline_runs=tuple(run for results in baselines for run in results.baseline_runs),
    )
