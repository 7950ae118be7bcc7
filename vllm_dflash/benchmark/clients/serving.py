# SPDX-License-Identifier: Apache-2.0
"""A server beside its completions: what it calls its model, what it has counted, and what it has cached."""

from __future__ import annotations

import time
from dataclasses import dataclass

from vllm_dflash.benchmark.clients.counters import counted_models, parse_counters
from vllm_dflash.benchmark.clients.requests import Endpoint
from vllm_dflash.benchmark.records import Counters

REPLY_S = 10.0
#: How long a server may take to count the last tokens that it has sent, and to let go of their requests.
SETTLE_S = 3.0
BUSY = 400


@dataclass(frozen=True)
class Server:
    """system: what it is called in tables. salted: whether it takes vLLM's `cache_salt`; else it is flushed."""

    system: str
    endpoint: Endpoint
    metrics_url: str
    salted: bool


def served_model(base_url: str, flag: str) -> str:
    """The name that the server gives to its model. Raises ValueError naming the flag if it does not answer."""
    import httpx

    url = f"{base_url}/v1/models"
    try:
        reply = httpx.get(url, timeout=REPLY_S)
        reply.raise_for_status()
        return str(reply.json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{flag} {base_url}: {url} does not name a model: {error!r}"[:300]) from error


def read_counters(server: Server) -> tuple[Counters | None, str | None]:
    """What it has counted since its start; or None and why not."""
    import httpx

    url, model = server.metrics_url, server.endpoint.model
    try:
        reply = httpx.get(url, timeout=REPLY_S)
        reply.raise_for_status()
        counters, models = parse_counters(reply.text, model), counted_models(reply.text)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        return None, f"{server.system}: no counters from {url}: {type(error).__name__}: {error}"[:300]
    if counters == Counters():
        return None, f"{server.system}: {url} holds none of vLLM's counters."
    if models and model not in models:
        return None, f"{server.system}: {url} holds no counters of model {model}; they are of {', '.join(models)}."
    return counters, None


def flush_cache(server: Server) -> str | None:
    """Empty SGLang's cache of prompts, which takes no salt. None; or, where it refuses, what a reader must know.

    It refuses with 400 while a request is under way, and the last one may still be ending.
    """
    import httpx

    url, deadline = f"{server.endpoint.base_url}/flush_cache", time.monotonic() + SETTLE_S
    while True:
        try:
            reply = httpx.post(url, timeout=REPLY_S)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            problem = f"{type(error).__name__}: {error}"[:200]
            break
        if reply.is_success:
            return None
        if reply.status_code != BUSY or time.monotonic() > deadline:
            problem = f"HTTP {reply.status_code}"
            break
        time.sleep(0.1)
    return f"{server.system}: its cache still holds the prompts of earlier runs: {url}: {problem}"
