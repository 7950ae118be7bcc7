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
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
import yaml

from tests.e2e.engines import TARGET, environment, held_out_prompts, run_engine

pytest.importorskip("ray", reason="needs Ray: pip install 'vllm-dflash[ray]'")

from tests.e2e.ray_serve import EXAMPLE, REPORT_S, TIMEOUT_S, example, is_alive, ray_cluster, wait_for  # noqa: E402

# The first test waits for the engine of the reference, the cluster and the first replica. The warnings are of Ray's and
# torch's own code.
pytestmark = [
    pytest.mark.engine, pytest.mark.timeout(1500), pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]  # fmt: skip

NUM_PROMPTS, MAX_TOKENS = 32, 24
#: So many clients ask for two replicas, by the fixture's autoscaling_config: few, who pause between requests, as an
#: engine that starts needs the cores as well.
HEAVY, PAUSE_S = 8, 1.5
BURST = 48
SETTLED_S = 3 * REPORT_S  # without a change
#: What a client sees of a replica's death (README): before the first byte, after it, and on the way to the replica.
DOCUMENTED = {"HTTP 500", "RemoteProtocolError", "HTTP 408"}
#: vLLM's and the plugin's counters as Ray names them.
TOKENS, DRAFTS = "ray_vllm_generation_tokens_total", "ray_vllm_spec_decode_num_drafts_total"
RUNNING = "ray_vllm_num_requests_running"
OUR_DRAFTS = "ray_vllm_dflash_spec_decode_num_drafts_total"


@pytest.fixture(scope="module")
def reference(cluster, tmp_path_factory):
    """The target's own text for every prompt, worked out while the first replica starts."""
    with ThreadPoolExecutor() as thread:
        yield thread.submit(target_texts, tmp_path_factory.mktemp("plain"))


def target_texts(folder):
    from transformers import AutoTokenizer

    run = {"name": "plain", "prompts": held_out_prompts(NUM_PROMPTS), "max_tokens": MAX_TOKENS}
    llm = {"model": str(TARGET), "dtype": "float32", "max_model_len": 1024}
    ids = run_engine(folder, llm, [run])["plain"].token_ids
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in ids]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with ray_cluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started


@pytest.fixture(scope="module")
def expected(url, reference):
    return reference.result(TIMEOUT_S)


@pytest.fixture(scope="module")
def url(cluster, reference, tmp_path_factory):
    """serve.yaml with one replica at first, which soon become two under load, and stay."""
    scaling = {
        "initial_replicas": 1, "target_ongoing_requests": 0.05,
        "upscale_delay_s": 1, "downscale_delay_s": 3600, "look_back_period_s": 3,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("example")
    with example(cluster, folder, autoscaling_config=scaling, health_check_period_s=1) as address:
        yield address


class Clients:
    """Some clients at once, each with one request after the other. What became of every request is kept."""

    def __init__(self, url: str, expected: list[str], pause_s: float) -> None:
        self.url, self.expected, self.pause_s = url, expected, pause_s
        self.prompts = held_out_prompts(NUM_PROMPTS)
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
            await asyncio.sleep(self.pause_s)

    async def complete(self, http: httpx.AsyncClient, prompt: int, streamed: bool) -> str:
        body = {
            "model": "tiny", "prompt": self.prompts[prompt], "max_tokens": MAX_TOKENS,
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
def load(url, expected, count, pause_s=PAUSE_S):
    """`count` clients at work in a thread for as long as the block lasts."""
    clients = Clients(url, expected, pause_s)
    with ThreadPoolExecutor() as thread:
        work = thread.submit(lambda: asyncio.run(clients.work(count)))
        try:
            yield clients
        finally:
            clients.stopped = True
        work.result(TIMEOUT_S)  # what went wrong in a client, or hangs


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
    clients = Clients(url, expected, pause_s=0)
    asyncio.run(clients.work(200, requests=200))
    assert clients.outcomes == {"right": 200}
    wait_for(lambda: sum(gained(cluster, before).values()) >= 200 * MAX_TOKENS, 240, "Ray's counters are behind")
    settled(cluster)
    shares = {replica: tokens for replica, tokens in gained(cluster, before).items() if tokens}
    assert sum(shares.values()) == 200 * MAX_TOKENS
    assert len(shares) == 2 and min(shares.values()) >= 40 * MAX_TOKENS, shares
    drafts = cluster.samples(OUR_DRAFTS)
    assert drafts == cluster.samples(DRAFTS) and all(drafts[replica] > 0 for replica in shares)


def gained(cluster, before):
    """Tokens by replica since then."""
    return {replica: tokens - before.get(replica, 0) for replica, tokens in cluster.samples(TOKENS).items()}


def settled(cluster):
    """Tokens by replica, once Ray has collected them all."""
    found, since = cluster.samples(TOKENS), time.monotonic()

    def is_settled() -> bool:
        nonlocal found, since
        if (now := cluster.samples(TOKENS)) != found:
            found, since = now, time.monotonic()
        return time.monotonic() - since > SETTLED_S

    wait_for(is_settled, 240, "Ray's counters do not settle")
    return found


def test_a_replica_is_killed_under_load(cluster, url, expected):
    """Its clients see what the README says, its engine ends with it, another replica takes its place."""
    scale_to_two(cluster, url, expected)
    (victim, replica), (survivor, _) = cluster.replicas().items()
    engine = [process.pid for process in psutil.Process(victim).children(recursive=True)]
    assert len(engine) >= 2, "an engine core and a worker"
    with load(url, expected, HEAVY) as background:
        with load(url, expected, BURST, pause_s=0) as burst:
            wait_for(lambda: burst.outcomes["right"] > BURST, 240, "no load")
            # As Ray collected it some seconds ago, and the clients do not pause.
            wait_for(lambda: cluster.samples(RUNNING)[replica] > 0, 240, f"no load on {replica}")
            os.kill(victim, signal.SIGKILL)
            wait_for(lambda: not any(map(is_alive, engine)), 120, f"orphans: {engine}")
        wait_for(lambda: len(cluster.replicas().keys() - {victim}) == 2, TIMEOUT_S, "no new replica")
    outcomes = background.outcomes + burst.outcomes
    errors = {outcome: count for outcome, count in outcomes.items() if outcome != "right"}
    # None at all, if Ray could give all of them to the other replica: no byte of an answer had been sent.
    assert set(errors) <= DOCUMENTED and sum(errors.values()) <= HEAVY + BURST, outcomes
    assert survivor in cluster.replicas()
    clients = Clients(url, expected, pause_s=0)
    asyncio.run(clients.work(BURST, requests=64))
    assert clients.outcomes == {"right": 64}


def test_top_sums_over_replicas(cluster, url, expected):
    """`vllm-dflash top` on a node's page."""
    scale_to_two(cluster, url, expected)
    asyncio.run(Clients(url, expected, pause_s=0).work(BURST, requests=64))
    settled(cluster)
    drafts, accepted = (
        sum(cluster.samples(f"ray_vllm_spec_decode_num_{name}_total", cluster.metrics[:1]).values())
        for name in ("drafts", "accepted_tokens")
    )
    command = [sys.executable, "-m", "vllm_dflash", "top", cluster.metrics[0], "--once", "--interval", "0.5"]
    done = subprocess.run(command, env=environment(COLUMNS="100"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"acceptance length +\S+ now, {1 + accepted / drafts:.2f} in all", done.stdout), done.stdout


def test_scales_down_under_load(cluster, url, expected):
    """Another number of replicas is deployed: the one that goes finishes its streams first, and its engine ends."""
    scale_to_two(cluster, url, expected)
    replicas = cluster.replicas()
    engines = {pid: psutil.Process(pid).children(recursive=True) for pid in replicas}
    with load(url, expected, HEAVY, pause_s=0) as clients:
        wait_for(lambda: clients.outcomes["right"] > HEAVY, 240, "no load")
        cluster.deploy_again(autoscaling_config={"initial_replicas": 1, "max_replicas": 1})
        wait_for(lambda: len(cluster.replicas()) == 1, TIMEOUT_S, "two replicas where one was asked for")
        (left,) = cluster.replicas()
        gone = [process.pid for pid in engines.keys() - {left} for process in engines[pid]]
        wait_for(lambda: not any(map(is_alive, gone)), 180, f"orphans: {gone}")
    assert gone and left in replicas, "the other one was not started anew"
    assert set(clients.outcomes) == {"right"} and clients.outcomes["right"] > HEAVY, clients.outcomes


@pytest.mark.parametrize("file", ["serve.yaml", "cluster.yaml"])
def test_files(file, monkeypatch):
    """Ray takes both of the example's files, and vLLM their arguments."""
    from ray.serve.schema import ServeDeploySchema

    monkeypatch.syspath_prepend(EXAMPLE)
    import app

    config = yaml.safe_load((EXAMPLE / file).read_text())
    ServeDeploySchema.model_validate(config)
    arguments = app.AppArgs.model_validate(config["applications"][0]["args"]).vllm_serve
    assert app.parse(arguments).speculative_config["method"] == "dflash"
    with pytest.raises(ValueError, match="args: vllm_serve: unrecognized arguments: --no-such-flag"):
        app.parse(f"{arguments} --no-such-flag")
