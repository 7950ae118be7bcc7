# SPDX-License-Identifier: Apache-2.0
"""Figures as SVG that takes its colours and fonts from the page around it, so that it is at home in light and dark.

matplotlib is told placeholder colours; afterwards they become the page's CSS variables.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

#: What matplotlib draws with, and what becomes of it.
INK, MUTED, GRID, PAPER = "#010101", "#010102", "#010103", "#010104"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)"}
NUM_SERIES = 8
SERIES = [f"#0102{number:02d}" for number in range(NUM_SERIES)]
VARIABLES |= {colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)}
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.5,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.labelcolor": INK,
}


@dataclass(frozen=True)
class Figure:
    """svg: the element itself. summary: what it shows, in words, for those who do not see it."""

    title: str
    summary: str
    caption: str
    svg: str


def colour(index: int) -> str:
    """Of the series with this number; they repeat after NUM_SERIES."""
    return SERIES[index % NUM_SERIES]


@contextmanager
def drawing(name: str) -> Iterator[Any]:
    """matplotlib's module of figures, in the page's style. name: makes the ids inside the SVG the figure's own."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        yield Canvas


def to_svg(canvas: Any, name: str, label: str) -> str:
    """The figure as an element of a page. label: its accessible name."""
    buffer = io.StringIO()
    canvas.savefig(
        buffer, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.04, metadata={"Date": None}
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for placeholder, variable in VARIABLES.items():
        text = text.replace(placeholder, variable)
    size = re.search(r'width="([\d.]+)pt" height="[\d.]+pt"', text)
    if size is None:
        raise RuntimeError("matplotlib wrote an SVG without a size")
    width = f'style="max-width: {float(size[1]) * 4 / 3:.0f}px"'
    return text.replace(size[0], f'role="img" aria-label="{escape(label)}" {width}', 1)
