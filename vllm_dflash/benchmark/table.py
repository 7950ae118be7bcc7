# SPDX-License-Identifier: Apache-2.0
"""The results in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_dflash.benchmark.columns import COLUMNS, NONE
from vllm_dflash.benchmark.results import Results


def show_results(results: Results, console: Console) -> None:
    """One row a run, without columns that are empty everywhere; then what a reader must know."""
    summaries = results.summaries
    used = [column for column in COLUMNS if any(column.value(summary) != NONE for summary in summaries)]
    table = Table(title_justify="left", caption=caption(results), caption_justify="left")
    for column in used:
        table.add_column(column.title, justify="right" if column.numeric else "left", overflow="fold")
    for summary in summaries:
        style = "red" if summary.errors else None
        table.add_row(*(Text(column.value(summary)) for column in used), style=style)
    if summaries:
        console.print(table)
    for note in all_notes(results):
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)


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
        found.insert(0, "Interrupted: the last run is not whole, and those that would have followed are missing.")
    found += [note for run in results.runs for note in run.notes]
    return list(dict.fromkeys(found))
