# SPDX-License-Identifier: Apache-2.0
"""`vllm-dflash bench`: speed and acceptance on prompt sets, against a server or with an engine of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_dflash.bench_backends import SERVERS, BenchOptions, Display, Plan, check_options, planned_runs
from vllm_dflash.bench_outputs import Outputs, check_outputs, finish, finish_after_error, save
from vllm_dflash.benchmark.engine_process import EngineFailedError
from vllm_dflash.benchmark.environment import environment
from vllm_dflash.benchmark.records import RequestRecord, Run
from vllm_dflash.benchmark.results import (
    PromptSetInfo,
    Results,
    Settings,
    load_results,
)
from vllm_dflash.benchmark.sets import PromptSet, load_prompt_set
from vllm_dflash.benchmark.side_by_side import merged_results, with_baseline
from vllm_dflash.console import INTERRUPTED, CommandError, require_packages, show_log_tail, value_errors


def run_bench(options: BenchOptions, outputs: Outputs, command: str, console: Console) -> int:
    """Measure, show and save. Returns the exit status: 130 after Ctrl-C, 1 if a run had no completed request.

    Whatever was measured before an error or Ctrl-C is saved and shown. Raises CommandError.
    """
    check_outputs(outputs)
    _require_packages(options, outputs)
    with value_errors():
        check_options(options)
        earlier = load_results(options.baseline) if options.baseline else None
        sets = [
            load_prompt_set(name, options.num_prompts, options.seed, options.revisions) for name in options.datasets
        ]
        _check_names(options.datasets, sets)
        plan = planned_runs(options, sets)
    results = Results(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        environment=environment(),
        settings=_settings(options, plan),
        prompt_sets=tuple(_info(one) for one in sets),
        runs=(),
        baseline=plan.baseline,
    )
    if earlier is not None:
        with value_errors():
            results = with_baseline(results, earlier, str(options.baseline))
    try:
        with _display(console) as display, contextlib.closing(plan.runs(display)) as runs:
            for run in runs:
                results = replace(results, runs=(*results.runs, run))
                save(results, outputs)
    except KeyboardInterrupt:
        results = replace(results, notes=(*results.notes, "Interrupted before the next run had begun."))
        finish_after_error(results, outputs, console)
        return INTERRUPTED
    except EngineFailedError as error:
        finish_after_error(results, outputs, console)
        show_log_tail(console, error.log)
        raise CommandError(f"{error}. Its whole log: {error.log}") from error
    except Exception:  # whatever it is: the runs before it stay
        finish_after_error(results, outputs, console)
        raise
    finish(results, outputs, console)
    return INTERRUPTED if results.interrupted else int(_any_run_failed(results.runs))


def render_saved(files: list[Path], baseline: Path | None, outputs: Outputs, console: Console) -> None:
    """The table and the report of earlier results, several of them side by side. Raises CommandError."""
    check_outputs(outputs)
    require_packages(("pydantic",), "bench")
    with value_errors():
        results = merged_results([(load_results(file), str(file)) for file in files])
        if baseline:
            results = with_baseline(results, load_results(baseline), str(baseline))
    finish(results, outputs, console)


def _any_run_failed(runs: tuple[Run, ...]) -> bool:
    return any(all(record.error for record in run.requests) for run in runs)


def _settings(options: BenchOptions, plan: Plan) -> Settings:
    return Settings(
        options.backend, options.max_tokens, options.temperature, options.top_p, options.thinking, options.chat,
        options.num_prompts, options.warm_up, options.seed, options.timeout_seconds, plan.model, plan.drafter,
        plan.num_speculative_tokens, plan.dtype, plan.api, dict(options.engine_args),
    )  # fmt: skip


def _check_names(datasets: Sequence[str], sets: Sequence[PromptSet]) -> None:
    """Runs are told apart by their set's name. Raises ValueError if two sets have the same."""
    seen: dict[str, str] = {}
    for dataset, prompt_set in zip(datasets, sets, strict=True):
        if prompt_set.name in seen:
            raise ValueError(
                f"--dataset {seen[prompt_set.name]} --dataset {dataset}: both are called {prompt_set.name}; "
                "a file is called by its name, so another name is needed"
            )
        seen[prompt_set.name] = dataset


def _info(prompt_set: PromptSet) -> PromptSetInfo:
    return PromptSetInfo(prompt_set.name, prompt_set.source, prompt_set.revision, len(prompt_set.conversations))


def _require_packages(options: BenchOptions, outputs: Outputs) -> None:
    require_packages(("httpx", "prometheus_client", "pydantic"), "bench")
    if outputs.report:
        require_packages(("jinja2", "matplotlib"), "bench")
    if options.backend not in SERVERS:
        require_packages(("torch",), "hf")


class _ProgressDisplay(Display):
    """One bar: the run under way and its requests."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task("", total=None, failed=0)

    def start(self, system: str, what: str, concurrency: int, num_requests: int) -> None:
        at = f" at {concurrency}" if concurrency else ""
        self.progress.reset(self.task, total=num_requests or None, description=f"{system}: {what}{at}", failed=0)

    def record(self, record: RequestRecord) -> None:
        failed = self.progress.tasks[0].fields["failed"] + (record.error is not None)
        self.progress.update(self.task, advance=1, failed=failed)


@contextlib.contextmanager
def _display(console: Console) -> Iterator[Display]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("requests, {task.fields[failed]} failed"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _ProgressDisplay(progress)
