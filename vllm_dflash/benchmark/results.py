# SPDX-License-Identifier: Apache-2.0
"""A benchmark's outcome as one JSON file: everything that the tables and the report are made of."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from vllm_dflash.benchmark.measures import Summary, summarise
from vllm_dflash.benchmark.records import Run
from vllm_dflash.files import write_whole

FORMAT: Literal["vllm-dflash-bench/1"] = "vllm-dflash-bench/1"


@dataclass(frozen=True)
class Settings:
    """What the requests asked for, and of what. thinking None: not said, so the server's template decides.

    model: the target, or what the server calls its model. api: a server's, None for an engine started here.
    drafter, num_speculative_tokens, dtype, engine_args: of an engine started here; a server does not tell them.
    """

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
    model: str | None = None
    drafter: str | None = None
    num_speculative_tokens: int | None = None
    dtype: str | None = None
    api: str | None = None
    engine_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptSetInfo:
    """Where a prompt set came from. revision: the commit of a hub's data set that was read."""

    name: str
    source: str
    revision: str | None
    prompts: int


@dataclass(frozen=True)
class Results:
    """baseline: the system that speed-ups are relative to, if it is among the runs or was read from another file.

    None where every run names its own reference, as in results of several files.
    """

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
        return tuple(summarise(run, speed) for run, speed in zip(self.runs, self.reference_speeds, strict=True))

    @property
    def reference_speeds(self) -> tuple[float | None, ...]:
        """For each run the tokens/s that its speed-up is over: its own, or the baseline's on the same prompts."""
        speeds = {
            (run.dataset, run.concurrency): summarise(run).tokens_per_second
            for run in (*self.runs, *self.baseline_runs)
            if run.system == self.baseline
        }
        return tuple(
            run.reference_tokens_per_second
            if self.baseline is None
            else None
            if run.system == self.baseline
            else speeds.get((run.dataset, run.concurrency))
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
