# SPDX-License-Identifier: Apache-2.0
"""Where the results of `vllm-dflash bench` go: the terminal, a JSON file, a page. A file that fails stops no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from vllm_dflash.benchmark.results import Results, save_results
from vllm_dflash.benchmark.table import show_results
from vllm_dflash.console import CommandError, require_packages


@dataclass(frozen=True)
class Outputs:
    """Where results go; None: nowhere but to the terminal."""

    json: Path | None = None
    report: Path | None = None


def check_outputs(outputs: Outputs) -> None:
    """Before an hour of measuring, not after it."""
    for flag, path in (("--output", outputs.json), ("--report", outputs.report)):
        if path and path.is_dir():
            raise CommandError(f"{flag} {path}: is a directory, a file is needed")
        if path and not path.absolute().parent.is_dir():
            raise CommandError(f"{flag} {path}: there is no directory {path.absolute().parent}")


def finish(results: Results, outputs: Outputs, console: Console) -> None:
    """The table, the file and the page. Where one cannot be written the other is; then raises CommandError."""
    show_results(results, console)
    failed: list[CommandError] = []
    for flag, name, path, write in (
        ("--output", "results", outputs.json, save_results),
        ("--report", "report", outputs.report, _write_report),
    ):
        try:
            _write(flag, path, results, write)
        except CommandError as error:
            failed.append(error)
            continue
        if path:
            console.print(f"{name}: {path}", highlight=False, soft_wrap=True)
    if failed:
        raise CommandError("; ".join(map(str, failed)))


def finish_after_error(results: Results, outputs: Outputs, console: Console) -> None:
    """As `finish`; but a file that cannot be written is only told, so that the error before it is raised."""
    try:
        finish(results, outputs, console)
    except CommandError as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)


def save(results: Results, outputs: Outputs) -> None:
    """As far as there are any, before the next run. Raises CommandError naming --output."""
    _write("--output", outputs.json, results, save_results)


def _write(flag: str, path: Path | None, results: Results, write: Callable[[Results, Path], None]) -> None:
    """Raises CommandError naming the flag if the file cannot be written."""
    try:
        if path:
            write(results, path)
    except OSError as error:
        raise CommandError(f"{flag} {path}: cannot be written: {error.strerror or error}") from error


def _write_report(results: Results, path: Path) -> None:
    require_packages(("jinja2", "matplotlib"), "bench")
    from vllm_dflash.benchmark.report.page import write_report

    write_report(results, path)
