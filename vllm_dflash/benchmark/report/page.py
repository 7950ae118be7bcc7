# SPDX-License-Identifier: Apache-2.0
"""The page: what stands in it, in which order, and how it is written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import vllm_dflash
from vllm_dflash.benchmark.columns import COLUMNS, NONE, Column, number
from vllm_dflash.benchmark.measures import Summary
from vllm_dflash.benchmark.report.plots import all_figures
from vllm_dflash.benchmark.results import Results
from vllm_dflash.benchmark.table import all_notes, caption
from vllm_dflash.files import write_whole

TEMPLATE = Path(__file__).with_name("page.html.jinja")

MEANINGS = (
    ("tokens/s", "Output tokens of all completed requests, divided by the seconds from the first request sent to the "
                 "last one ended. Prefill and waiting are included."),
    ("speed-up", "tokens/s, divided by the baseline's on the same prompts at the same concurrency."),
    ("TTFT", "Time to first token: from the request sent to the first chunk that carries a token."),
    ("TPOT", "Time per output token: from the first token to the last, divided by the output tokens less one. A chunk "
             "may carry several tokens, so tokens are counted and not chunks."),
    ("acceptance length, pooled", "1 + accepted / drafts, over all requests: the tokens that a verification step "
                                  "yields, the target's own token included. Long responses weigh more."),
    ("acceptance length, mean", "Every response's own acceptance length, averaged: all responses weigh the same."),
    ("acceptance rate", "Accepted / drafted tokens. At 15 draft tokens, an acceptance length of 6 is a rate of 33 %."),
    ("p50, p99", "Median and 99th percentile of the completed requests, linear between the nearest ranks."),
    ("errors", "Requests that gave no whole answer. They are in no time and in no count of tokens. A server's counters "
               "hold what it did for them, and so do acceptance, prefix hits and preemptions."),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    title: str
    text: str
    numeric: bool


@dataclass(frozen=True)
class Row:
    """best: the fastest system of its prompt set and concurrency, where there are several."""

    cells: tuple[Cell, ...]
    failed: bool
    best: bool


@dataclass(frozen=True)
class Failure:
    kind: str
    count: int
    run: str
    detail: str


def write_report(results: Results, path: Path) -> None:
    """One self-contained page. An old one is replaced whole."""
    write_whole(path, page(results))


def page(results: Results) -> str:
    """The page's text. Light or dark is the reader's own preference."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    summaries = results.summaries
    figures = [asdict(figure) | {"svg": Markup(figure.svg)} for figure in all_figures(results)]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        headline=headline(results),
        caption=caption(results),
        tiles=tiles(summaries),
        notes=all_notes(results),
        columns=used_columns(summaries),
        rows=[_row(summary, summaries) for summary in summaries],
        figures=figures,
        failures=list(failures(results)),
        command=results.command,
        facts=facts(results),
        meanings=MEANINGS,
        version=vllm_dflash.__version__,
    )


def headline(results: Results) -> str:
    systems = dict.fromkeys(run.system for run in results.runs)
    sets = dict.fromkeys(info.name for info in results.prompt_sets)
    return f"{_listed(list(systems)) or 'Nothing measured'} on {_listed(list(sets))}"


def _listed(names: list[str]) -> str:
    """a, b and c"""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def tiles(summaries: Iterable[Summary]) -> list[tuple[str, str]]:
    """The best of each figure, and where it was reached."""
    summaries = list(summaries)
    found = []
    speeds = [s for s in summaries if s.tokens_per_second is not None]
    if speeds:
        best = max(speeds, key=lambda s: s.tokens_per_second or 0.0)
        found.append((number(best.tokens_per_second, 0), f"highest tokens/s: {_where(best)}"))
    ratios = [s for s in summaries if s.speedup is not None]
    if ratios:
        best = max(ratios, key=lambda s: s.speedup or 0.0)
        found.append((number(best.speedup, 2, "x"), f"largest speed-up: {_where(best)}"))
    lengths = [s for s in summaries if s.acceptance_length_pooled is not None]
    if lengths:
        best = max(lengths, key=lambda s: s.acceptance_length_pooled or 0.0)
        found.append((number(best.acceptance_length_pooled, 2), f"longest acceptance, pooled: {_where(best)}"))
    requests, failed = sum(s.requests for s in summaries), sum(sum(s.errors.values()) for s in summaries)
    if requests:
        found.append((f"{requests - failed:,} / {requests:,}", "requests completed / sent"))
    return found


def _where(summary: Summary) -> str:
    return f"{summary.system}, {summary.dataset}, {summary.concurrency} at once"


def used_columns(summaries: Iterable[Summary]) -> list[Column]:
    summaries = list(summaries)
    return [column for column in COLUMNS if any(column.value(summary) != NONE for summary in summaries)]


def _row(summary: Summary, summaries: tuple[Summary, ...]) -> Row:
    cells = tuple(Cell(c.title, c.value(summary), c.numeric) for c in used_columns(summaries))
    rivals = [s for s in summaries if (s.dataset, s.concurrency) == (summary.dataset, summary.concurrency)]
    fastest = max(rivals, key=lambda s: s.tokens_per_second or 0.0)
    return Row(cells, bool(summary.errors), len(rivals) > 1 and fastest is summary)


def failures(results: Results) -> Iterable[Failure]:
    for run in results.runs:
        by_kind: dict[str, list[str]] = {}
        for record in run.requests:
            if record.error:
                by_kind.setdefault(record.error.kind, []).append(f"{record.name}: {record.error.detail}")
        where = f"{run.system}, {run.dataset}, {run.concurrency} at once"
        for kind, details in by_kind.items():
            yield Failure(kind, len(details), where, details[0])


def facts(results: Results) -> list[tuple[str, Any]]:
    settings = results.settings
    found: list[tuple[str, Any]] = [("measured", results.created)]
    for info in results.prompt_sets:
        revision = f" at {info.revision}" if info.revision else ""
        found.append((f"prompts: {info.name}", f"{info.prompts} from {info.source}{revision}"))
    words = {None: "as the template has it", True: "on", False: "off"}
    found += [
        ("backend", settings.backend if settings.api is None else f"{settings.backend}, API: {settings.api}"),
        *(
            (label, value)
            for label, value in (
                ("model", settings.model),
                ("drafter", settings.drafter),
                ("draft tokens", settings.num_speculative_tokens),
                ("computes in", settings.dtype),
                ("engine arguments", json.dumps(settings.engine_args)),
            )
            if value not in (None, "{}")
        ),
        ("prompts sent", "through the chat template" if settings.chat else "raw"),
        ("thinking", words[settings.thinking]),
        ("output tokens", f"at most {settings.max_tokens}"),
        ("sampling", f"temperature {settings.temperature:g}, top-p {settings.top_p:g}, seed {settings.seed}"),
        ("warm-up", f"{settings.warm_up} prompts before each run"),
        ("timeout", f"{settings.timeout_seconds:g} s a request"),
    ]
    return found + list(results.environment.items())
