# SPDX-License-Identifier: Apache-2.0
"""The screen, for a terminal of 80 columns or more."""

from __future__ import annotations

import time

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vllm_dflash.top.snapshot import Snapshot
from vllm_dflash.top.window import Lately

Rates = tuple[float | None, ...]

#: Positions that are shown; few drafts come further.
_POSITIONS = 16
_NOTHING = "-"
#: What the plugin's reasons mean, and of what they are counted.
REASONS = {
    "hybrid_target": "engines draft chains instead of trees: the target has recurrent state",
    "eager_backend": "engines draft without CUDA graphs: the attention backend does not go into them",
    "no_graph": "steps drafted outside of CUDA graphs: none of their size was captured",
    "assumed_costs": "engines share out tree nodes by assumed costs: nothing was captured, so nothing was timed",
    "does_not_pay": "steps without drafting, as it would not have paid",
    "chain_sampling": "requests verified chains instead of trees: their sampling looks back (penalties, grammars, ...)",
    "chain_logits_processor": "requests verified chains instead of trees: a logits processor of your own",
}


def render(url: str, snapshot: Snapshot, lately: Lately, note: str = "") -> RenderableType:
    """All of it. `note`: what the user should know of the connection."""
    parts: list[RenderableType] = [_title(url, snapshot)]
    if note:
        parts.append(Text(f" {note}", style="bold yellow"))
    parts.append(_load(snapshot, lately))
    if snapshot.has_speculation:
        parts += [_drafting(snapshot, lately), _positions(snapshot, lately)]
    else:
        parts.append(Panel("This server does not speculate.", title="Drafting", title_align="left"))
    if snapshot.has_plugin:
        parts.append(_fallbacks(snapshot))
    return Group(*parts)


def _title(url: str, snapshot: Snapshot) -> Text:
    engines = "1 engine" if snapshot.num_engines == 1 else f"{snapshot.num_engines} engines"
    up = "" if snapshot.started is None else f"  up {_duration(time.time() - snapshot.started)}"
    models = ", ".join(snapshot.models) or "?"
    return Text.assemble((f" {models}", "bold"), f"  {url.removesuffix('/metrics')}  {engines}{up}")


def _load(snapshot: Snapshot, lately: Lately) -> Panel:
    """Throughput, queue and caches."""
    total, now = snapshot.counters, lately.counters
    grid = _grid(4)
    grid.add_row(
        "output", _number(lately.per_second(now.output_tokens), "tokens/s"),
        "running", Text(f"{snapshot.running:.0f}", style="bold"),
    )  # fmt: skip
    grid.add_row(
        "prompts", _number(lately.per_second(now.prompt_tokens), "tokens/s"),
        "waiting", Text(f"{snapshot.waiting:.0f}", style="bold"),
    )  # fmt: skip
    grid.add_row(
        "KV cache", Text(f"{_percent(snapshot.kv_usage)} in use"),
        "preempted", Text(f"{now.preemptions:.0f} now, {total.preemptions:.0f} in all"),
    )  # fmt: skip
    interval = snapshot.prefill_interval
    admitted = ("prompts", f"every {interval:.0f} steps") if interval > 1 else ("", "")
    hits = Text(f"{_percent(now.hit_rate)} hits now, {_percent(total.hit_rate)} in all")
    grid.add_row("prefix cache", hits, *admitted)
    return Panel(grid, title=f"Load (now: {lately.seconds:.0f} s)", title_align="left")


def _drafting(snapshot: Snapshot, lately: Lately) -> Panel:
    """What drafts bring, and what they cost."""
    total, now = snapshot.counters, lately.counters
    grid = _grid(4)
    lengths = Text.assemble(
        (_plain(now.acceptance_length), "bold green"), f" now, {_plain(total.acceptance_length)} in all"
    )
    grid.add_row("acceptance length", lengths, "drafts", _number(lately.per_second(now.drafts), "a second"))
    sizes = Text(f"{_ratio(now.drafted, now.drafts, 1)} now, {_ratio(total.drafted, total.drafts, 1)} in all")
    budget = ("", "")
    if snapshot.budget is not None:
        budget = ("budget", "{:.0f} nodes for {:.0f} requests".format(*snapshot.budget))
    grid.add_row("tokens verified a draft", sizes, *budget)
    if total.timed_steps:
        recent = now if now.timed_steps else total
        verify_ms, draft_ms = (1e3 * s / recent.timed_steps for s in (recent.verify_seconds, recent.draft_seconds))
        grid.add_row("step, verifying", Text(f"{verify_ms:.2f} ms"), "drafting", Text(f"{draft_ms:.2f} ms"))
    return Panel(grid, title="Drafting (pooled over all requests)", title_align="left")


def _positions(snapshot: Snapshot, lately: Lately) -> Panel:
    """A bar for each position of a draft, in two columns."""
    total, now = snapshot.counters.position_rates, lately.counters.position_rates
    shown = min(len(total), _POSITIONS)
    half = (shown + 1) // 2
    table = Table.grid(padding=(0, 2), expand=True)
    for _ in range(2):
        table.add_column(justify="right")
        table.add_column(ratio=1)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
    heads = [Text(head, style="dim") for head in ("at", "", "in all", "now")]
    table.add_row(*heads, *heads)
    for place in range(half):
        table.add_row(*(cell for at in (place, place + half) if at < shown for cell in _bar(at, total, now)))
    of = "of drafts that had the position" if snapshot.has_plugin else "of all drafts, also of those that were shorter"
    more = f"; {len(total) - shown} more not shown" if len(total) > shown else ""
    return Panel(table, title=f"Accepted by position, {of}{more}", title_align="left")


def _bar(place: int, total: Rates, now: Rates) -> list[RenderableType]:
    rate, recent = total[place], now[place] if place < len(now) else None
    bar = ProgressBar(total=1.0, completed=rate or 0.0, complete_style="green", finished_style="green")
    return [str(place), bar, _percent(rate), _percent(recent)]


def _fallbacks(snapshot: Snapshot) -> RenderableType:
    """Those that happened."""
    happened = [(reason, count) for reason, count in snapshot.counters.fallbacks if count]
    if not happened:
        return Text(" no fall-backs since the start", style="dim")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right")
    for reason, count in happened:
        grid.add_row(f"{count:.0f}", Text(REASONS.get(reason, reason)))
    return Panel(grid, title="Fall-backs since the start", title_align="left")


def _grid(columns: int) -> Table:
    grid = Table.grid(padding=(0, 2), expand=True)
    for column in range(columns):
        grid.add_column(style="dim" if column % 2 == 0 else "", ratio=None if column % 2 == 0 else 1, no_wrap=True)
    return grid


def _plain(value: float | None, digits: int = 2) -> str:
    return _NOTHING if value is None else f"{value:.{digits}f}"


def _number(value: float | None, unit: str) -> Text:
    return Text.assemble((_plain(value, 1), "bold"), f" {unit}")


def _percent(share: float | None) -> str:
    return _NOTHING if share is None else f"{100 * share:.1f} %"


def _ratio(count: float, of: float, digits: int) -> str:
    return _plain(count / of if of else None, digits)


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{hours} h {minutes % 60:02d} min" if hours else f"{minutes} min {int(seconds) % 60:02d} s"
