# SPDX-License-Identifier: Apache-2.0
"""The command: one screen, or one after the other until Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.live import Live

from vllm_dflash.console import CommandError, require_packages
from vllm_dflash.top.polling import Poller, UnreachableError
from vllm_dflash.top.screen import render
from vllm_dflash.top.snapshot import NotVllmError, Snapshot
from vllm_dflash.top.window import WINDOW_SECONDS, Window

Sleep = Callable[[float], None]


def run_top(url: str, interval: float, once: bool, console: Console) -> None:
    """Show a server until Ctrl-C, or one time. Raises CommandError if there is none to begin with."""
    require_packages(("httpx", "prometheus_client"), "bench")
    view = View(Poller(url))
    try:
        view.begin()
        if once:
            time.sleep(interval)
            view.begin()
            console.print(view.screen())
            return
        follow(view, interval, console, time.sleep)
    except KeyboardInterrupt:
        return


@dataclass
class View:
    """What is known of a server."""

    poller: Poller
    clock: Callable[[], float] = time.monotonic
    note: str = ""

    def __post_init__(self) -> None:
        self.window = Window()
        self.latest: Snapshot | None = None
        self._away_since: float | None = None

    def begin(self) -> None:
        """The first look. Raises CommandError where there is nothing to see."""
        try:
            self._add(self.poller.fetch())
        except (UnreachableError, NotVllmError) as error:
            raise CommandError(f"URL: {error}") from error

    def look(self) -> None:
        """One look more. A server that is away may come back."""
        try:
            self._add(self.poller.fetch())
        except (UnreachableError, NotVllmError) as error:
            if self._away_since is None:
                self._away_since = self.clock()
            seconds = self.clock() - self._away_since
            self.note = f"{error}. What is shown is of before; trying again ({seconds:.0f} s so far), Ctrl-C ends"
            return
        self._away_since = None
        is_new = self.window.num_restarts and self.window.lately().seconds < WINDOW_SECONDS
        self.note = "The server was restarted: all counts begin anew" if is_new else ""

    def screen(self) -> RenderableType:
        """As it is now."""
        assert self.latest is not None, "a screen before begin()"
        return render(self.poller.url, self.latest, self.window.lately(), self.note)

    def _add(self, snapshot: Snapshot) -> None:
        self.window.add(snapshot)
        self.latest = snapshot


def follow(view: View, interval: float, console: Console, sleep: Sleep) -> None:
    """Screen after screen. Where there is no terminal, they are printed one under the other."""
    if not console.is_terminal:
        while True:
            console.print(view.screen())
            sleep(interval)
            view.look()
    with Live(view.screen(), console=console, screen=True, auto_refresh=False) as live:
        while True:
            sleep(interval)
            view.look()
            live.update(view.screen(), refresh=True)
