# SPDX-License-Identifier: Apache-2.0
"""Fetching a server's /metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from vllm_dflash.console import CommandError
from vllm_dflash.top.snapshot import NotVllmError, Snapshot, parse

_TIMEOUT_SECONDS = 5.0


class UnreachableError(Exception):
    """The server did not answer, or not with its metrics. The message says how."""


def metrics_url(url: str) -> str:
    """The address of its metrics: `localhost:8000`, `http://host:8000/` and `http://host:8000/metrics` are alike.

    Raises CommandError for what is no address.
    """
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or True)
    except ValueError:  # a port that is no number
        is_address = False
    if not is_address:
        raise CommandError(f"URL: {url!r} is no address of a server, such as http://localhost:8000")
    path = parts.path.rstrip("/").removesuffix("/v1")  # a base URL as OpenAI's clients have it
    path = path if path.endswith("/metrics") else f"{path}/metrics"
    return parts._replace(path=path, query="", fragment="").geturl()


class Poller:
    """One server."""

    def __init__(self, url: str, transport: Any = None, clock: Callable[[], float] = time.monotonic) -> None:
        import httpx

        self.url, self._clock = metrics_url(url), clock
        self._client = httpx.Client(timeout=_TIMEOUT_SECONDS, follow_redirects=True, transport=transport)

    def fetch(self) -> Snapshot:
        """Its metrics now. Raises UnreachableError, or NotVllmError for another server's page."""
        import httpx

        try:
            answer = self._client.get(self.url)
        except httpx.HTTPError as error:
            raise UnreachableError(f"{self.url} does not answer: {str(error) or type(error).__name__}") from error
        except (httpx.InvalidURL, UnicodeError) as error:  # of hosts that have no name in DNS, also after a redirection
            raise UnreachableError(f"{self.url} cannot be asked: {error}") from error
        if answer.status_code >= 500:
            raise UnreachableError(f"{self.url} answers {answer.status_code} {answer.reason_phrase}")
        if answer.status_code != 200:
            raise NotVllmError(f"{self.url} answers {answer.status_code} {answer.reason_phrase}")
        try:
            return parse(answer.text, self._clock())
        except NotVllmError as error:
            raise NotVllmError(f"{self.url} is not of a vLLM server: {error}") from error
