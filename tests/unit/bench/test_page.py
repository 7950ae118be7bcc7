# SPDX-License-Identifier: Apache-2.0
"""The report: what it says, that it needs nothing from outside, and that a browser shows it without complaint."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.unit.bench.samples import results
from vllm_dflash.benchmark.report.page import page, write_report
from vllm_dflash.benchmark.report.plots import all_figures

CHROMIUM = next((name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium")
TITLES = ["Acceptance by position", "Accepted tokens of a draft", "Throughput by concurrency", "Speed-up by prompt set"]


class References(HTMLParser):
    """Everything in a page that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "srcset") and value:
                self.found.append(value)


def test_the_page_fetches_nothing_and_runs_nothing() -> None:
    text, references = page(results()), References()
    references.feed(text)
    assert references.scripts == 0
    assert {value for value in references.found if not value.startswith("#")} == {"data:,"}  # the empty icon
    assert not re.search(r"url\((?!#)|@import", text)


def test_names_are_text_and_never_markup() -> None:
    text = page(results())
    assert "&lt;b&gt;own &amp; set&lt;/b&gt;" in text
    assert "<b>own" not in text
    assert "<script>note" not in text


def test_the_page_tells_the_numbers_of_the_table() -> None:
    text = page(results())
    for expected in ("153.6", "2.40x", "3.85", "3.60", "40.7%", "1 timeout", "32 / 33", "no end after 1 s"):
        assert expected in text


def test_every_plot_is_an_image_with_a_name_that_tells_its_values() -> None:
    figures = all_figures(results())
    assert [figure.title for figure in figures] == TITLES
    for figure in figures:
        root = ElementTree.fromstring(figure.svg)
        assert root.get("role") == "img"
        assert figure.summary in (root.get("aria-label") or "")
    # 32 of 40 drafts had their first token accepted, 3 the seventh; 8 had none, 6 exactly one. Two concurrencies each.
    assert "80%, 65%, 50%, 38%, 28%, 18%, 8%" in figures[0].summary
    assert "mini: 16, 12, 12, 10, 8, 8, 8, 6 drafts" in figures[1].summary
    assert "server, mini at 1: 2.40x" in figures[3].summary


def test_plots_take_their_colours_from_the_page() -> None:
    for figure in all_figures(results()):
        assert "var(--ink)" in figure.svg or "var(--muted)" in figure.svg
        assert not re.search(r"#0101|#0102", figure.svg)
        ids = re.findall(r'\bid="([^"]+)"', figure.svg)
        assert ids
        assert len(set(ids)) == len(ids)
    everything = "".join(figure.svg for figure in all_figures(results()))
    ids = re.findall(r'\bid="([^"]+)"', everything)
    assert len(set(ids)) == len(ids)


def test_the_same_results_make_the_same_page() -> None:
    assert page(results()) == page(results())


def test_a_page_of_failures_alone_and_of_nothing(tmp_path: Path) -> None:
    whole = results()
    (failed,) = [record for record in whole.runs[-1].requests if record.error]
    only_errors = replace(whole, runs=(replace(whole.runs[0], requests=(failed,), counters=None),))
    assert "1 timeout" in page(only_errors)
    write_report(replace(whole, runs=()), tmp_path / "empty.html")
    assert "No run was begun." in (tmp_path / "empty.html").read_text(encoding="utf-8")


def browse(text: str, folder: Path, *arguments: str) -> tuple[str, list[str]]:
    """What a headless browser without a network prints, and the messages of its console."""
    file = folder / "page.html"
    file.write_text(text, encoding="utf-8")
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
         "--enable-logging=stderr", *arguments, file.as_uri()],
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_chromium
def test_a_browser_shows_the_page_without_a_complaint(tmp_path: Path) -> None:
    dom, messages = browse(page(results()), tmp_path, "--dump-dom")
    assert messages == []
    assert [title for title in TITLES if f"<h3>{title}</h3>" in dom] == TITLES
    assert dom.count("<svg") == len(TITLES)


@needs_chromium
def test_planted_complaints_are_seen(tmp_path: Path) -> None:
    """So that no message in the test above means that there was none. The page forbids itself to fetch and to run."""
    planted = '<img src="https://example.com/x.png"><script>console.log(1)</script></body>'
    _, messages = browse(page(results()).replace("</body>", planted), tmp_path, "--dump-dom")
    assert any("https://example.com/x.png" in message for message in messages)
    assert any("inline script" in message for message in messages)
    broken = page(results()).replace("<meta http-equiv", "<script>undefinedFunction()</script><meta http-equiv")
    _, messages = browse(broken, tmp_path, "--dump-dom")
    assert any("undefinedFunction is not defined" in message for message in messages)
