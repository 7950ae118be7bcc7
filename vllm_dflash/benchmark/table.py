# SPDX-License-Identifier: Apache-2.0
"""The results in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from vllm_dflash.benchmark.columns import COLUMNS, NONE, Column
from vllm_dflash.benchmark.measures import Summary
from vllm_dflash.benchmark.results import Results

#: The first columns tell rows apart, so they stand in every table.
IDENTIFYING = 3
UNBOUNDED = 10_000


def show_results(results: Results, console: Console) -> None:
    """One row a run, without columns that are empty everywhere; then what a reader must know.

    Where the terminal is too narrow for one table there are several, one below the other.
    """
    summaries = results.summaries
    used = [column for column in COLUMNS if any(column.value(summary) != NONE for summary in summaries)]
    if summaries:
        for table in _fitting_tables(used, summaries, console):
            console.print(table)
        console.print(Text(caption(results), style="dim"))
    for note in all_notes(results):
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)


def _fitting_tables(columns: list[Column], summaries: Sequence[Summary], console: Console) -> list[Table]:
    """As few as the terminal's width allows, each with at least one column of its own."""
    same, rest = columns[:IDENTIFYING], columns[IDENTIFYING:]
    tables: list[list[Column]] = [[*same, rest[0]]]
    for column in rest[1:]:
        wider = [*tables[-1], column]
        if _width(_table(wider, summaries), console) <= console.width:
            tables[-1] = wider
        else:
            tables.append([*same, column])
    return [_table(table, summaries) for table in tables]


def _width(table: Table, console: Console) -> int:
    """Characters that it takes if nothing is folded."""
    return Measurement.get(console, console.options.update(max_width=UNBOUNDED), table).maximum


def _table(columns: list[Column], summaries: Sequence[Summary]) -> Table:
    table = Table()
    for column in columns:
        table.add_column(
            column.title, justify="right" if column.numeric else "left", no_wrap=column.numeric, overflow="fold"
        )
    for summary in summaries:
        table.add_row(*(Text(column.value(summary)) for column in columns), style="red" if summary.errors else None)
    return table


def caption(results: Results) -> str:
    settings = results.settings
    thinking = {None: "", True: ", thinking", False: ", no thinking"}[settings.thinking]
    baseline = f"; speed-up over {results.baseline}" if results.baseline else ""
    return (
        f"backend {settings.backend}, {'chat' if settings.chat else 'raw'}{thinking}, at most {settings.max_tokens} "
        f"tokens, temperature {settings.temperature:g}{baseline}. AL: acceptance length, bonus token "
        "included; TTFT and TPOT: p50 / p99."
    )


def all_notes(results: Results) -> list[str]:
    """Of the whole and of its runs, each once."""
    found = list(results.notes)
    if results.interrupted:
        found.insert(0, "Interrupted: the last run is not whole, and runs that would have followed are missing.")
    found += [note for run in results.runs for note in run.notes]
    return list(dict.fromkeys(found))
