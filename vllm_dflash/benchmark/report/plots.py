# SPDX-License-Identifier: Apache-2.0
"""The plots of a report, each from the runs' summaries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vllm_dflash.benchmark.measures import Summary
from vllm_dflash.benchmark.metrics import AcceptanceCounts
from vllm_dflash.benchmark.report.figures import INK, MUTED, PAPER, Figure, colour, drawing, to_svg
from vllm_dflash.benchmark.results import Results

WIDTH, PANEL_HEIGHT = 10.4, 2.8  # inches
MAX_COLUMNS = 3


def all_figures(results: Results) -> list[Figure]:
    """Those that there is something to show in."""
    found = (
        acceptance_by_position(results),
        accepted_per_draft(results),
        throughput(results),
        speedup(results),
    )
    return [figure for figure in found if figure is not None]


def pooled_counts(results: Results) -> dict[tuple[str, str], AcceptanceCounts]:
    """By system and prompt set, over all concurrencies."""
    found: dict[tuple[str, str], AcceptanceCounts] = {}
    for run in results.runs:
        counts = run.counters.acceptance if run.counters else None
        if counts and counts.drafts:
            key = (run.system, run.dataset)
            found[key] = found[key] + counts if key in found else counts
    return found


def _labels(keys: Sequence[tuple[str, str]]) -> list[str]:
    """System and prompt set, as far as they differ."""
    one_system, one_set = len({system for system, _ in keys}) == 1, len({dataset for _, dataset in keys}) == 1
    return [dataset if one_system else system if one_set else f"{system}, {dataset}" for system, dataset in keys]


def _colours(keys: Sequence[tuple[str, Any]], results: Results) -> list[str]:
    """Of series that belong to systems: each system has its own everywhere, unless one system has several series."""
    systems = [system for system, _ in keys]
    if len(set(systems)) < len(systems):
        return [colour(1 + index) for index in range(len(keys))]
    return [system_colour(system, results) for system in systems]


def system_colour(system: str, results: Results) -> str:
    """Grey for the baseline, and the others in the order in which they ran."""
    if system == results.baseline:
        return colour(0)
    others = _in_order(run.system for run in results.runs if run.system != results.baseline)
    return colour(1 + others.index(system))


def acceptance_by_position(results: Results) -> Figure | None:
    pooled = pooled_counts(results)
    if not pooled:
        return None
    keys = list(pooled)
    biased = any(counts.drafted_per_position is None for counts in pooled.values())
    with drawing("positions") as canvas_of:
        canvas = canvas_of(figsize=(WIDTH, 3.3))
        axes = canvas.subplots()
        for label, shade, counts in zip(_labels(keys), _colours(keys, results), pooled.values(), strict=True):
            rates = counts.position_rates
            axes.plot(range(1, len(rates) + 1), rates, marker="o", color=shade, label=label, clip_on=False)
        longest = max(len(counts.position_rates) for counts in pooled.values())
        axes.set(xlabel="position in the draft", ylabel="accepted", ylim=(0, 1), xlim=(0.6, longest + 0.4))
        axes.set_xticks(range(1, longest + 1))
        axes.yaxis.set_major_formatter(_percent)
        axes.grid(axis="x", visible=False)
        _legend(canvas, axes)
        words = "; ".join(
            f"{label}: {', '.join(f'{rate:.0%}' for rate in counts.position_rates)}"
            for label, counts in zip(_labels(keys), pooled.values(), strict=True)
        )
        svg = to_svg(canvas, "positions", f"Acceptance by position in the draft. {words}")
    divisor = (
        "Share of all drafts whose token at this position was accepted; late positions are biased low where drafts "
        "were of different lengths."
        if biased
        else "Share of the drafts with a token at this position whose token was accepted."
    )
    return Figure("Acceptance by position", words, f"{divisor} Pooled over all concurrencies.", svg)


def accepted_per_draft(results: Results) -> Figure | None:
    pooled = pooled_counts(results)
    if not pooled:
        return None
    labels, shades = _labels(list(pooled)), _colours(list(pooled), results)
    with drawing("histogram") as canvas_of:
        canvas = canvas_of(figsize=(WIDTH, 3.0))
        axes = canvas.subplots()
        width = 0.82 / len(pooled)
        for index, counts in enumerate(pooled.values()):
            shares = [count / counts.drafts for count in counts.histogram]
            offset = (index - (len(pooled) - 1) / 2) * width
            places = [place + offset for place in range(len(shares))]
            axes.bar(places, shares, width * 0.94, color=shades[index], label=labels[index])
        longest = max(len(counts.histogram) for counts in pooled.values())
        axes.set(xlabel="accepted tokens of a draft", ylabel="drafts", xlim=(-0.6, longest - 0.4))
        axes.set_xticks(range(longest))
        axes.yaxis.set_major_formatter(_percent)
        axes.grid(axis="x", visible=False)
        _legend(canvas, axes)
        words = "; ".join(
            f"{label}: {', '.join(f'{count}' for count in counts.histogram)} drafts with 0, 1, 2, ... accepted tokens"
            for label, counts in zip(labels, pooled.values(), strict=True)
        )
        svg = to_svg(canvas, "histogram", f"Accepted tokens of a draft. {words}")
    caption = "How many tokens of each draft were accepted; every draft yields one token more, the target's own."
    return Figure("Accepted tokens of a draft", words, caption, svg)


def throughput(results: Results) -> Figure | None:
    known = [summary for summary in results.summaries if summary.tokens_per_second is not None]
    if not known:
        return None
    sets, systems = _in_order(s.dataset for s in known), _in_order(s.system for s in known)
    shades = {system: system_colour(system, results) for system in systems}
    levels = sorted({summary.concurrency for summary in known})
    words = "; ".join(f"{s.system}, {s.dataset} at {s.concurrency}: {s.tokens_per_second:,.0f}" for s in known)
    with drawing("throughput") as canvas_of:
        columns = min(len(sets), MAX_COLUMNS)
        rows = math.ceil(len(sets) / columns)
        canvas = canvas_of(figsize=(WIDTH, PANEL_HEIGHT * rows + 0.3))
        panels = canvas.subplots(rows, columns, squeeze=False).flatten()
        for panel, dataset in zip(panels, sets, strict=False):
            _throughput_panel(panel, [s for s in known if s.dataset == dataset], shades, levels)
            panel.set_title(dataset)
        for panel in panels[len(sets) :]:
            panel.set_visible(False)
        panels[0].set_ylabel("output tokens/s")
        canvas.subplots_adjust(hspace=0.55, wspace=0.28)
        _legend(canvas, panels[0])
        svg = to_svg(canvas, "throughput", f"Output tokens per second. {words}")
    caption = "Output tokens of completed requests a second, by the number of requests in flight."
    return Figure("Throughput by concurrency", words, caption, svg)


def _throughput_panel(axes: Any, summaries: list[Summary], shades: dict[str, str], levels: list[int]) -> None:
    """Bars side by side for each concurrency. They start at zero, so that lengths compare as speeds do."""
    systems = list(shades)
    width = 0.82 / len(systems)
    for summary in summaries:
        index = systems.index(summary.system)
        place = levels.index(summary.concurrency) + (index - (len(systems) - 1) / 2) * width
        speed = summary.tokens_per_second or 0.0
        axes.bar(place, speed, width * 0.94, color=shades[summary.system], label=summary.system)
        if len(levels) * len(systems) <= 9:
            axes.annotate(
                f"{speed:,.0f}", (place, speed), xytext=(0, 3), textcoords="offset points", ha="center",
                color=MUTED, fontsize=8,
            )  # fmt: skip
    axes.set_xticks(range(len(levels)), [str(level) for level in levels])
    axes.set(xlim=(-0.6, len(levels) - 0.4), xlabel="requests in flight")
    axes.margins(y=0.14)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="x", visible=False)


def speedup(results: Results) -> Figure | None:
    known = [summary for summary in results.summaries if summary.speedup is not None]
    baseline = results.baseline or "each file's own baseline"
    if not known:
        return None
    series = _in_order((s.system, s.concurrency) for s in known)
    systems = {system for system, _ in series}
    sets = _in_order(s.dataset for s in known)
    height = 0.27 * len(known) + 0.35 * len(sets) + 0.5
    words = "; ".join(f"{s.system}, {s.dataset} at {s.concurrency}: {s.speedup:.2f}x" for s in known)
    with drawing("speedup") as canvas_of:
        canvas = canvas_of(figsize=(WIDTH, height))
        axes = canvas.subplots()
        width = 0.82 / len(series)
        for summary in known:
            index = series.index((summary.system, summary.concurrency))
            place = sets.index(summary.dataset) + (index - (len(series) - 1) / 2) * width
            at = f"{summary.concurrency} at once"
            label = at if len(systems) == 1 else f"{summary.system}, {at}"
            shade, strength = system_colour(summary.system, results), _strength(summary.concurrency, series)
            axes.barh(place, summary.speedup, width * 0.9, color=PAPER)  # or the grid shines through
            axes.barh(place, summary.speedup, width * 0.9, color=shade, alpha=strength, label=label)
            axes.annotate(
                f"{summary.speedup:.2f}x", (summary.speedup or 0.0, place), xytext=(4, 0), textcoords="offset points",
                va="center", color=INK, fontsize=8.5, bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
            )  # fmt: skip
        axes.axvline(1.0, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(sets)), sets)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_xlabel(f"tokens/s relative to {baseline}")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axes.grid(axis="y", visible=False)
        _legend(canvas, axes)
        svg = to_svg(canvas, "speedup", f"Speed-up over {baseline}. {words}")
    caption = f"Output tokens/s divided by those of {baseline}, on the same prompts at the same concurrency."
    return Figure("Speed-up by prompt set", words, caption, svg)


def _strength(concurrency: int, series: Sequence[tuple[str, int]]) -> float:
    """How solid a bar is: the more requests at once, the more."""
    levels = sorted({level for _, level in series})
    return 1.0 - 0.6 * (len(levels) - 1 - levels.index(concurrency)) / max(len(levels) - 1, 1)


def _percent(value: float, _: int) -> str:
    return f"{value:.0%}"


def _in_order(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))


def _legend(canvas: Any, axes: Any) -> None:
    """Above the plot and its panels' titles, each label once; none for a single series."""
    handles: dict[str, Any] = {}
    for one in canvas.axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if len(handles) > 1:
        canvas.legend(
            list(handles.values()), list(handles), loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3,
            bbox_transform=canvas.transFigure if axes.get_title(loc="left") else axes.transAxes, borderpad=0.2,
            handlelength=1.2, columnspacing=1.6,
        )  # fmt: skip
