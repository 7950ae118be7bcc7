# SPDX-License-Identifier: Apache-2.0
"""examples/ray_serve on a Ray cluster of two nodes: texts, a replica's death, scaling up and down under load.

One deployment for all tests, of one replica or two as the load asks for. Its texts are held against vLLM's own without
speculation.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.e2e.engines import TARGET, environment, held_out_prompts, run_engine

pytest.importorskip("ray", reason="needs Ray: pip install 'vllm-dflash[ray]'")

from tests.e2e.ray_serve import TIMEOUT_S, example, is_alive, ray_cluster, wait_for  # noqa: E402

pytestmark = pytest.mark.engine

NUM_PROMPTS, MAX_TOKENS = 32, 24
#: More requests at once than one replica is to have by the deployment's autoscaling_config, and fewer.
HEAVY, LIGHT = 24, 4
#: What a client sees of a replica's death (README): before the first byte, and after it.
DOCUMENTED = {"HTTP 500", "RemoteProtocolError"}
#: vLLM's and the plugin's counters as Ray names them.
TOKENS, DRAFTS = "ray_vllm_generation_tokens_total", "ray_vllm_spec_decode_num_drafts_total"
OUR_DRAFTS = "ray_vllm_dflash_spec_decode_num_drafts_total"


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The target's own text for every prompt."""
    from transformers import AutoTokenizer

    run = {"name": "plain", "prompts": held_out_prompts(NUM_PROMPTS), "max_tokens": MAX_TOKENS}
    llm = {"model": str(TARGET), "dtype": "float32", "max_model_len": 1024}
    ids = run_engine(tmp_path_factory.mktemp("plain"), llm, [run])["plain"].token_ids
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in ids]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with ray_cluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started


@pytest.fixture(scope="module")
def url(cluster, tmp_path_factory):
    """serve.yaml with shorter delays, and one replica at first."""
    scaling = {"initial_replicas": 1, "upscale_delay_s": 1, "downscale_delay_s": 12, "look_back_period_s": 3}
    folder = tmp_path_factory.mktemp("example")
    with example(cluster, folder, autoscaling_config=scaling, health_check_period_s=1) as address:
        yield address


class Clients:
    """Some clients at once, each with one request after the other. What became of every request is kept."""

    def __init__(self, url: str, expected: list[str]) -> None:
        self.url, self.expected = url, expected
        self.outcomes: Counter[str] = Counter()
        self.stopped = False

    async def work(self, count: int, requests: int | None = None) -> None:
        """Until stopped, or so many requests of all together."""
        numbers = iter(range(requests) if requests else iter(int, 1))
        async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=None)) as http:
            await asyncio.gather(*(self.one_client(http, client, numbers) for client in range(count)))

    async def one_client(self, http: httpx.AsyncClient, client: int, numbers: Iterator[int]) -> None:
        for place, _ in enumerate(numbers):
            if self.stopped:
                return
            prompt = (client + place) % NUM_PROMPTS
            try:
                text = await self.complete(http, prompt, streamed=client % 4 != 3)
                self.outcomes["right" if text == self.expected[prompt] else f"wrong: {text!r}"] += 1
            except httpx.HTTPStatusError as error:
                self.outcomes[f"HTTP {error.response.status_code}"] += 1
            except httpx.TransportError as error:
                self.outcomes[type(error).__name__] += 1

    async def complete(self, http: httpx.AsyncClient, prompt: int, streamed: bool) -> str:
        body = {
            "model": "tiny", "prompt": held_out_prompts(prompt + 1)[prompt], "max_tokens": MAX_TOKENS,
            "temperature": 0, "ignore_eos": True, "stream": streamed,
        }  # fmt: skip
        text = ""
        async with http.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            response.raise_for_status()
            if not streamed:
                return json.loads(await response.aread())["choices"][0]["text"]
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return text
                if line:
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        return f"{text} without [DONE]"


@contextlib.contextmanager
def load(url, expected, count):
    """`count` clients at work in a thread for as long as the block lasts."""
    clients = Clients(url, expected)
    thread = threading.Thread(target=lambda: asyncio.run(clients.work(count)))
    thread.start()
    try:
        yield clients
    finally:
        clients.stopped = True
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "a request hangs"


def scale_to_two(cluster, url, expected):
    with load(url, expected, HEAVY) as clients:
        wait_for(lambda: len(cluster.replicas()) == 2, TIMEOUT_S, "no second replica")
    return clients


def test_scales_up_under_load(cluster, url, expected):
    """No request is lost or wrong while a second replica starts."""
    clients = scale_to_two(cluster, url, expected)
    assert set(clients.outcomes) == {"right"} and clients.outcomes["right"] > HEAVY, clients.outcomes


def test_many_streams(cluster, url, expected):
    """200 at once: every text is right, both replicas took part, both drafted, and nothing was computed twice."""
    scale_to_two(cluster, url, expected)
    before = settled(cluster)
    clients = Clients(url, expected)
    asyncio.run(clients.work(200, requests=200))
    assert clients.outcomes == {"right": 200}
    after = settled(cluster)
    gained = {replica: after[replica] - before.get(replica, 0) for replica in after}
    shares = {replica: tokens for replica, tokens in gained.items() if tokens}
    assert sum(shares.values()) == 200 * MAX_TOKENS
    assert len(shares) == 2 and min(shares.values()) >= 40 * MAX_TOKENS, shares
    drafts = cluster.samples(OUR_DRAFTS)
    assert drafts == cluster.samples(DRAFTS) and all(drafts[replica] > 0 for replica in shares)


def settled(cluster):
    """Tokens by replica, once Ray has collected them all."""
    found: list[dict[str, float]] = [{}]

    def is_settled() -> bool:
        found.append(cluster.samples(TOKENS))
        return len(found) > 6 and all(tokens == found[-1] for tokens in found[-6:])

    wait_for(is_settled, 60, "Ray's counters do not settle")
    return found[-1]


def test_a_replica_is_killed_under_load(cluster, url, expected):
    """Its clients see what the README says, its engine ends with it, another replica takes its place."""
    scale_to_two(cluster, url, expected)
    victim, survivor = cluster.replicas()
    engine = [process.pid for process in psutil.Process(victim).children(recursive=True)]
    assert len(engine) >= 2, "an engine core and a worker"
    with load(url, expected, HEAVY) as clients:
        wait_for(lambda: clients.outcomes["right"] > HEAVY, 60, "no load")
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: not any(map(is_alive, engine)), 30, f"orphans: {engine}")
        wait_for(lambda: len(cluster.replicas().keys() - {victim}) == 2, TIMEOUT_S, "no new replica")
    errors = {outcome: count for outcome, count in clients.outcomes.items() if outcome != "right"}
    assert errors and set(errors) <= DOCUMENTED and sum(errors.values()) <= HEAVY, clients.outcomes
    assert survivor in cluster.replicas()
    clients = Clients(url, expected)
    asyncio.run(clients.work(HEAVY, requests=64))
    assert clients.outcomes == {"right": 64}


def test_top_sums_over_replicas(cluster, url, expected):
    """`vllm-dflash top` on a node's page."""
    scale_to_two(cluster, url, expected)
    settled(cluster)
    drafts, accepted = (
        sum(cluster.samples(f"ray_vllm_spec_decode_num_{name}_total", cluster.metrics[:1]).values())
        for name in ("drafts", "accepted_tokens")
    )
    command = [sys.executable, "-m", "vllm_dflash", "top", cluster.metrics[0], "--once", "--interval", "0.5"]
    done = subprocess.run(command, env=environment(COLUMNS="100"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"acceptance length +\S+ now, {1 + accepted / drafts:.2f} in all", done.stdout), done.stdout


def test_scales_down_under_load(cluster, url, expected):
    """The replica that goes finishes its streams first, and its engine ends."""
    scale_to_two(cluster, url, expected)
    engines = {pid: psutil.Process(pid).children(recursive=True) for pid in cluster.replicas()}
    with load(url, expected, LIGHT) as clients:
        wait_for(lambda: len(cluster.replicas()) == 1, TIMEOUT_S, "two replicas for a light load")
        (left,) = cluster.replicas()
        gone = [process.pid for pid in engines.keys() - {left} for process in engines[pid]]
        wait_for(lambda: gone and not any(map(is_alive, gone)), 60, f"orphans: {gone}")
    assert set(clients.outcomes) == {"right"} and clients.outcomes["right"] > LIGHT, clients.outcomes
