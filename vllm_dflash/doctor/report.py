# SPDX-License-Identifier: Apache-2.0
"""The doctor's screen, and the same as JSON. The verdict first, then what to change, then everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_dflash import __version__
from vllm_dflash.benchmark.metrics import AcceptanceCounts
from vllm_dflash.doctor.finding import Finding, Severity, exit_code, worst
from vllm_dflash.doctor.measurement import Measurement, Run

_SYMBOLS = {Severity.OK: "✓", Severity.INFO: "i", Severity.WARNING: "!", Severity.ERROR: "✗"}
_STYLES = {Severity.OK: "green", Severity.INFO: "cyan", Severity.WARNING: "yellow", Severity.ERROR: "red"}
_VERDICTS = {
    Severity.OK: "this pair goes together",
    Severity.INFO: "this pair goes together",
    Severity.WARNING: "this pair starts, but something is likely to cost speed",
    Severity.ERROR: "this pair does not work as it is",
}
_BAR_WIDTH = 20


@dataclass(frozen=True)
class Report:
    """Everything that is shown."""

    target: str
    drafter: str
    findings: tuple[Finding, ...]
    measurement: Measurement | None = None


def as_json(report: Report) -> dict[str, Any]:
    """The machine-readable report. Severities by name; `exit_code` is the command's, `verdict` the same in a word."""
    return {
        "version": __version__,
        "target": report.target,
        "drafter": report.drafter,
        "verdict": ("ok", "warning", "error")[exit_code(report.findings)],
        "exit_code": exit_code(report.findings),
        "findings": [
            {"id": one.id, "severity": one.severity.name.lower(), "seen": one.seen, "change": one.change or None}
            for one in report.findings
        ],
        "measurement": None if report.measurement is None else _measurement_json(report.measurement),
    }


def _measurement_json(measurement: Measurement) -> dict[str, Any]:
    return {
        "prompts": measurement.num_prompts,
        "max_new_tokens": measurement.max_new_tokens,
        "device": measurement.device,
        "dtype": measurement.dtype,
        "seconds": round(measurement.seconds, 1),
        "runs": [
            {
                "target_layer_ids": list(run.layer_ids),
                "shift": run.shift,
                "mode": run.mode,
                "drafts": run.counts.drafts,
                "acceptance_length": _rounded(run.counts.acceptance_length),
                "acceptance_rate": _rounded(run.counts.acceptance_rate),
                "position_rates": [_rounded(rate) for rate in run.counts.position_rates],
            }
            for run in measurement.runs
        ],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def show(report: Report, console: Console) -> None:
    """Print the screen."""
    console.print(_verdict(report.findings, _as_given(report.measurement)))
    pair = Table.grid(padding=(0, 2))
    pair.add_row(Text("target", style="dim"), Text(report.target))
    pair.add_row(Text("drafter", style="dim"), Text(report.drafter))
    console.print(pair)
    groups = (
        ("To change", (Severity.ERROR, Severity.WARNING)),
        ("To know", (Severity.INFO,)),
        ("Checked", (Severity.OK,)),
    )
    width = max((len(one.id) for one in report.findings), default=0)
    for title, severities in groups:
        found = [one for severity in severities for one in report.findings if one.severity == severity]
        if found:
            console.print()
            console.print(Text(title, style="bold"))
            console.print(_listing(found, width))
    if report.measurement is not None:
        console.print()
        _show_measurement(report.measurement, console)


def _as_given(measurement: Measurement | None) -> Run | None:
    """The run of the pair as it is."""
    return None if measurement is None else next((run for run in measurement.runs if run.shift == 0), None)


def _verdict(findings: Sequence[Finding], measured: Run | None) -> Text:
    severity = worst(findings)
    counts = {one: sum(finding.severity == one for finding in findings) for one in Severity}
    parts = [
        _count(counts[Severity.ERROR], "error"),
        _count(counts[Severity.WARNING], "warning"),
        _count(counts[Severity.INFO], "note"),
        f"{counts[Severity.OK]} {'check' if counts[Severity.OK] == 1 else 'checks'} passed",
    ]
    told = ", ".join(part for part in parts if part)
    length = "" if measured is None else f", acceptance length {measured.length:.2f}"
    symbol = _SYMBOLS[Severity.OK] if severity < Severity.WARNING else _SYMBOLS[severity]
    style = _STYLES[Severity.OK] if severity < Severity.WARNING else _STYLES[severity]
    verdict = "these models cannot be read" if _nothing_read(findings) else _VERDICTS[severity]
    return Text.assemble((f"{symbol} {verdict}{length}", f"bold {style}"), f"  ({told})")


def _nothing_read(findings: Sequence[Finding]) -> bool:
    return any(finding.id == "unreadable" for finding in findings)


def _count(number: int, name: str) -> str:
    return "" if not number else f"{number} {name}" if number == 1 else f"{number} {name}s"


def _listing(findings: Sequence[Finding], width: int) -> Table:
    """One row a finding: symbol, id, what was seen and, below it, what to change."""
    table = Table.grid(padding=(0, 1))
    table.add_column(width=1)
    table.add_column(width=width, no_wrap=True)
    table.add_column(overflow="fold")
    for one in findings:
        style = _STYLES[one.severity]
        said = Text(one.seen)
        if one.change:
            said.append(f"\n→ {one.change}", style="bold" if one.severity >= Severity.WARNING else "")
        table.add_row(Text(_SYMBOLS[one.severity], style=style), Text(one.id, style=style), said)
    return table


def _show_measurement(measurement: Measurement, console: Console) -> None:
    table = Table(
        title=f"Measured: {measurement.num_prompts} prompts, up to {measurement.max_new_tokens} tokens each, greedy, "
        f"{measurement.dtype} on {measurement.device}, {measurement.seconds:.0f} s",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("target layers")
    table.add_column("template mode")
    for name in ("acceptance length", "acceptance rate", "drafts"):
        table.add_column(name, justify="right")
    for run in measurement.runs:
        table.add_row(*_row(run))
    console.print(table)
    as_given = _as_given(measurement)
    if as_given is not None:
        console.print(Text("share of drafts accepted up to each position, the pair as it is:", style="dim"))
        console.print(_positions(as_given.counts))


def _row(run: Run) -> tuple[str, ...]:
    which = "as given" if run.shift == 0 else f"each {run.shift:+d}"
    rate, length = run.counts.acceptance_rate, run.counts.acceptance_length
    shown = ("-", "-") if rate is None or length is None else (f"{length:.2f}", f"{rate:.1%}")
    return (f"{which} {list(run.layer_ids)}", run.mode, *shown, str(run.counts.drafts))


def _positions(counts: AcceptanceCounts) -> Table:
    table = Table.grid(padding=(0, 1))
    for position, rate in enumerate(counts.position_rates, start=1):
        table.add_row(f"{position:>2}", f"{'█' * round(rate * _BAR_WIDTH):<{_BAR_WIDTH}}", f"{rate:>4.0%}")
    return table
