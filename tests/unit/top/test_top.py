# SPDX-License-Identifier: Apache-2.0
"""`vllm-dflash top` on pages of /metrics: what is read, what is shown, and servers that come and go."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest

pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")
import httpx
from metrics_pages import NOT_VLLM, PLUGIN, RAY, VLLM_ONLY, with_values
from rich.console import Console
from typer.testing import CliRunner

from vllm_dflash.cli import app
from vllm_dflash.compat.metrics.fallbacks import Fallback
from vllm_dflash.console import CommandError
from vllm_dflash.top import command
from vllm_dflash.top.command import View, follow
from vllm_dflash.top.polling import Poller, metrics_url
from vllm_dflash.top.screen import REASONS, render
from vllm_dflash.top.snapshot import NotVllmError, parse
from vllm_dflash.top.window import Window

BOTH = VLLM_ONLY + PLUGIN
URL = "http://server:8000/metrics"


def shown(page: str, later: str | None = None, seconds: float = 4.0, width: int = 100) -> str:
    """The screen of one page, or of two."""
    window = Window()
    snapshot = parse(page, 100.0)
    window.add(snapshot)
    if later is not None:
        snapshot = parse(later, 100.0 + seconds)
        window.add(snapshot)
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(URL, snapshot, window.lately()))
    return console.export_text()


# What a page says.


def test_vllms_own_counters_are_enough() -> None:
    snapshot = parse(VLLM_ONLY, 0.0)
    counters = snapshot.counters
    assert (snapshot.running, snapshot.waiting, snapshot.kv_usage) == (7, 2, 0.5)
    assert (snapshot.models, snapshot.num_engines, snapshot.started) == (("tiny",), 2, 1.7e9)
    assert (snapshot.has_speculation, snapshot.has_plugin, snapshot.budget) == (True, False, None)
    assert counters.output_tokens == 150
    assert counters.acceptance_length == 1 + 50 / 40
    assert counters.hit_rate == 0.25
    assert counters.position_rates == (28 / 40, 16 / 40, 6 / 40)


def test_the_plugins_denominators() -> None:
    snapshot = parse(BOTH, 0.0)
    assert snapshot.has_plugin
    assert snapshot.counters.position_rates == (28 / 40, 16 / 32, 6 / 24)
    assert snapshot.budget == (42, 7)
    assert snapshot.counters.acceptance_length == 1 + 50 / 40
    assert dict(snapshot.counters.fallbacks) == {"does_not_pay": 12, "no_graph": 0, "of a later version": 2}


def test_drafts_of_which_nothing_was_verified_are_none() -> None:
    """vLLM counts 60 more of them than the plugin."""
    name = 'num_drafts_total{engine="0",model_name="tiny"} '
    page = VLLM_ONLY.replace(f"{name}30.0", f"{name}90.0")
    counters = parse(page + PLUGIN, 0.0).counters
    assert (counters.drafts, counters.acceptance_length) == (40, 1 + 50 / 40)
    assert parse(page, 0.0).counters.drafts == 100


def test_rays_page_is_summed_over_replicas() -> None:
    snapshot = parse(RAY, 0.0)
    assert (snapshot.models, snapshot.num_engines, snapshot.running) == (("tiny",), 2, 7)
    assert (snapshot.has_speculation, snapshot.has_plugin) == (True, True)
    assert snapshot.counters.output_tokens == 175
    assert snapshot.counters.acceptance_length == 1 + 25 / 20


def test_positions_are_ordered_as_numbers() -> None:
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    lines = [f'{name}{{engine="0",position="{place}"}} {100.0 - place}' for place in (0, 10, 2, 1, 9)]
    assert parse("\n".join(lines) + "\n", 0.0).counters.accepted_per_position == (100, 99, 98, 91, 90)


def test_a_server_without_speculation() -> None:
    page = "\n".join(line for line in VLLM_ONLY.splitlines() if "spec_decode" not in line) + "\n"
    snapshot = parse(page, 0.0)
    assert not snapshot.has_speculation
    assert snapshot.counters.acceptance_length is None and snapshot.counters.position_rates == ()
    assert "does not speculate" in shown(page)


def test_a_server_that_has_not_drafted() -> None:
    page = re.sub(r" [0-9.]+$", " 0.0", BOTH, flags=re.MULTILINE)
    assert parse(page, 0.0).counters.position_rates == (None, None, None)
    assert "acceptance length        - now, - in all" in shown(page, page)


@pytest.mark.parametrize("page", [NOT_VLLM, "", "<html><body>hello</body></html>\n", '{"detail": "Not Found"}\n'])
def test_other_pages(page: str) -> None:
    with pytest.raises(NotVllmError):
        parse(page, 0.0)


# Lately.


def test_rates_are_those_of_the_last_seconds() -> None:
    window = Window()
    for at, tokens in ((0.0, 100.0), (8.0, 900.0), (14.0, 1500.0), (20.0, 3100.0)):
        window.add(parse(with_values(VLLM_ONLY, generation_tokens_total=tokens), at))
    lately = window.lately()
    # The newest snapshot that is 10 seconds old or more is that of second 8.
    assert lately.seconds == 12
    assert lately.per_second(lately.counters.output_tokens) == (3100 - 900) / 12


def test_one_snapshot_has_no_rates() -> None:
    window = Window()
    window.add(parse(VLLM_ONLY, 5.0))
    assert window.lately().per_second(3.0) is None


def test_a_restarted_server_counts_anew() -> None:
    window = Window()
    window.add(parse(BOTH, 0.0))
    window.add(parse(with_values(BOTH, generation_tokens_total=10.0), 2.0))
    assert window.num_restarts == 1
    assert window.lately().seconds == 0
    window.add(parse(with_values(BOTH, generation_tokens_total=30.0), 4.0))
    assert window.num_restarts == 1
    assert window.lately().counters.output_tokens == 20


def test_a_restarted_server_that_has_caught_up() -> None:
    window = Window()
    window.add(parse(BOTH, 0.0))
    window.add(parse(BOTH.replace("seconds 1.7e+09", "seconds 1.8e+09"), 2.0))
    assert window.num_restarts == 1


def test_a_fall_back_that_is_new_is_no_restart() -> None:
    window = Window()
    window.add(parse(VLLM_ONLY, 0.0))
    window.add(parse(BOTH, 2.0))
    assert window.num_restarts == 0
    assert dict(window.lately().counters.fallbacks)["does_not_pay"] == 12


# The screen.


def test_what_is_shown() -> None:
    later = with_values(
        BOTH, generation_tokens_total=180.0, spec_decode_num_drafts_total=60.0,
        spec_decode_num_accepted_tokens_total=80.0, num_preemptions_total=3.0,
    )  # fmt: skip
    text = re.sub(r"[ │]+", " ", shown(BOTH, later))
    assert "output 20.0 tokens/s running 7 " in text  # 80 tokens in 4 seconds
    assert "waiting 2 " in text
    assert "KV cache 50.0 % in use preempted 2 now, 3 in all" in text
    assert "hits now, 25.0 % in all" in text
    # 20 drafts and 40 accepted tokens lately; 60 and 90 in all.
    assert "acceptance length 3.00 now, 2.50 in all drafts 5.0 a second" in text
    assert "budget 42 nodes for 7 requests" in text
    assert "prompts every 6 steps" in text
    assert "verifying 5.00 ms drafting 1.50 ms" in text
    assert "12 steps without drafting, as it would not have paid" in text
    assert "2 of a later version" in text and "outside of CUDA graphs" not in text
    assert "of drafts that had the position" in text and "25.0 %" in text


@pytest.mark.parametrize("width", [80, 100])
def test_the_screen_fits(width: int) -> None:
    lines = shown(BOTH, BOTH, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= 24, "more than a small terminal's lines"
    if width == 100:
        assert not [line for line in lines if "…" in line]


def test_without_the_plugin_the_screen_says_what_its_bars_are_of() -> None:
    text = shown(VLLM_ONLY)
    assert "of all drafts, also of those that were shorter" in text
    assert "Fall-backs" not in text and "budget" not in text and "prompts every" not in text


def test_every_reason_is_explained() -> None:
    assert set(REASONS) == {reason.value for reason in Fallback}


# Servers.


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("localhost:8000", "http://localhost:8000/metrics"),
        ("http://host:8000/", "http://host:8000/metrics"),
        ("http://host:8000/metrics", "http://host:8000/metrics"),
        ("http://host:8000/v1", "http://host:8000/metrics"),
        ("https://host/prefix", "https://host/prefix/metrics"),
    ],
)
def test_addresses(given: str, expected: str) -> None:
    assert metrics_url(given) == expected


@pytest.mark.parametrize("given", ["", "ftp://host", "http://", "host:port", "http://host:99999999"])
def test_what_is_no_address_is_named(given: str) -> None:
    with pytest.raises(CommandError, match=re.escape(repr(given))):
        metrics_url(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("http://a..b", "label empty"),
        ("http://é..x:80", "Invalid IDNA hostname: 'é..x'"),
        ("http://xn--a:1", "Codepoint U+0080"),
        ("http://host/\x01", "Invalid non-printable ASCII character in URL"),
    ],
)
def test_hosts_that_have_no_name_in_dns(given: str, message: str) -> None:
    """Refused by httpx or by Python before anything is sent."""
    expected = rf"^URL: {re.escape(given)}/metrics cannot be asked: .*{re.escape(message)}"
    with pytest.raises(CommandError, match=expected):
        View(Poller(given, httpx.HTTPTransport())).begin()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def view_of(*answers: str | int | Exception) -> tuple[View, Clock]:
    """A view of a server that answers so: with a page, a status or not at all."""
    left, clock = list(answers), Clock()

    def answer(request: Any) -> Any:
        given = left.pop(0)
        if isinstance(given, Exception):
            raise given
        return httpx.Response(given) if isinstance(given, int) else httpx.Response(200, text=given)

    return View(Poller("server:8000", httpx.MockTransport(answer), clock), clock), clock


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (httpx.ConnectError("Connection refused"), r"does not answer: Connection refused"),
        (httpx.ReadTimeout(""), r"does not answer: ReadTimeout"),
        (404, r"answers 404 Not Found"),
        (503, r"answers 503 Service Unavailable"),
        (NOT_VLLM, r"is not of a vLLM server: no metric whose name begins with vllm: among its 1"),
        ("<html>\n", r"is not of a vLLM server: not Prometheus' text format"),
    ],
)
def test_no_server_to_begin_with(answer: Any, message: str) -> None:
    with pytest.raises(CommandError, match=rf"^URL: {URL} {message}"):
        view_of(answer)[0].begin()


def test_a_server_that_goes_away_and_comes_back() -> None:
    gone, again = httpx.ConnectError("Connection refused"), with_values(BOTH, prompt_tokens_total=1.0)
    view, at = view_of(BOTH, gone, 502, BOTH, gone, again, again)
    view.begin()
    for problem in ("does not answer: Connection refused. What", "answers 502 Bad Gateway. What"):
        view.look()
        assert problem in view.note and f"trying again ({at():.0f} s so far)" in view.note
        assert view.latest is not None and view.latest.counters.output_tokens == 150
        at.now += 7.0
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(view.screen())
    assert "answers 502" in console.export_text().splitlines()[1], "below what a small terminal shows"
    view.look()
    assert view.note == ""
    at.now += 100.0
    view.look()
    assert "trying again (0 s so far)" in view.note
    view.look()
    assert view.note == "The server was restarted: all counts begin anew"
    at.now += 10.0
    view.look()
    assert view.note == ""


class Ended(Exception):
    pass


@pytest.mark.parametrize("terminal", [True, False])
def test_screens_follow_each_other(terminal: bool) -> None:
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            raise Ended

    console = Console(width=100, record=True, force_terminal=terminal, file=open("/dev/null", "w"))  # noqa: SIM115
    view, _ = view_of(BOTH, with_values(BOTH, generation_tokens_total=1111.0), httpx.ConnectError("gone"))
    view.begin()
    with pytest.raises(Ended):
        follow(view, 0.5, console, sleep)
    assert naps == [0.5] * 3
    assert "gone" in view.note


def test_ctrl_c_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(view: View, *rest: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "Poller", lambda url: view_of(BOTH)[0].poller)
    monkeypatch.setattr(command, "follow", interrupted)
    result = CliRunner().invoke(app, ["top", "server:8000"])
    assert (result.exit_code, result.output) == (0, "")


def test_one_screen_for_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "Poller", lambda url: view_of(BOTH, BOTH)[0].poller)
    result = CliRunner().invoke(app, ["top", "server:8000", "--once", "--interval", "0.1"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    assert "acceptance length" in result.stdout and "budget" in result.stdout


def test_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["top", "ftp://server"])
    assert result.exit_code == 1
    assert (
        result.output.strip() == "error: URL: 'ftp://server' is no address of a server, such as http://localhost:8000"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["top", "server:8000"])
    assert result.output.strip() == "error: httpx, prometheus-client not installed: pip install 'vllm-dflash[bench]'"
