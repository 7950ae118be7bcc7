# SPDX-License-Identifier: Apache-2.0
"""`vllm serve TARGET --speculative-config '{"method": "dflash", "model": DRAFTER}'`, over the OpenAI API."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.engines import TARGET, environment, held_out_prompts, run_engine
from tests.e2e.serving import serving

pytestmark = pytest.mark.engine

NUM_REQUESTS, MAX_TOKENS = 8, 96
ABORTED = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Compiled as by default."""
    with serving(tmp_path_factory.mktemp("server")) as url_and_log:
        yield url_and_log


@pytest.fixture(scope="module")
def expected_texts(tmp_path_factory):
    """The target's own text for every prompt: vLLM without speculation, decoded by the tokenizer."""
    from transformers import AutoTokenizer

    run = {"name": "plain", "prompts": held_out_prompts(NUM_REQUESTS), "max_tokens": MAX_TOKENS}
    llm = {"model": str(TARGET), "dtype": "float32", "max_model_len": 1024}
    ids = run_engine(tmp_path_factory.mktemp("plain"), llm, [run])["plain"].token_ids
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in ids]


async def stream_completion(client, url, prompt, stop_after=None):
    """The text of one streamed completion; closes the connection after `stop_after` chunks."""
    body = {
        "model": "tiny", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": True,
        "ignore_eos": True,
    }  # fmt: skip
    text, chunks = "", 0
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line in ("", "data: [DONE]"):
                continue
            text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            chunks += 1
            if chunks == stop_after:
                break
    return text


def test_concurrent_streams_with_one_aborted(server, expected_texts):
    url, _ = server

    async def everything():
        async with httpx.AsyncClient(timeout=120) as client:
            jobs = [
                stream_completion(client, url, prompt, stop_after=2 if index == ABORTED else None)
                for index, prompt in enumerate(held_out_prompts(NUM_REQUESTS))
            ]
            return await asyncio.gather(*jobs)

    texts = asyncio.run(everything())
    for index, (text, expected) in enumerate(zip(texts, expected_texts, strict=True)):
        if index == ABORTED:
            assert text and len(text) < len(expected) and expected.startswith(text)
        else:
            assert text == expected, f"request {index}"


def test_drafts_come_from_this_plugin(server):
    """By the log line, and by vLLM's counters; runs after the completions."""
    url, log = server
    assert "vllm_dflash: drafting with DFlashProposer (V1 runner), 15 tokens a block of 16" in log.read_text()
    found = metrics(url)
    for name in ("num_drafts", *(f"num_accepted_tokens_per_pos[{place}]" for place in range(15))):
        assert found[f"vllm_dflash:spec_decode_{name}"] == found[f"vllm:spec_decode_{name}"] > 0
    assert found["vllm_dflash:draft_time_seconds_count"] > 0
    assert found["vllm_dflash:verify_time_seconds_sum"] > found["vllm_dflash:draft_time_seconds_sum"] > 0


def metrics(url):
    """By name, or `name[position]`, of the only engine; under the labels that vLLM's own have."""
    found = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=10).text):
        for sample in family.samples if family.name.startswith(("vllm:", "vllm_dflash:")) else []:
            position = sample.labels.get("position")
            found[sample.name.removesuffix("_total") + (f"[{position}]" if position else "")] = sample.value
            if "spec_decode" in sample.name:
                labels = {name: value for name, value in sample.labels.items() if name != "position"}
                assert labels == {"model_name": "tiny", "engine": "0"}, sample
    return found


def test_top(server):
    """One screen of the same server, as a script gets it."""
    url, _ = server
    command = [sys.executable, "-m", "vllm_dflash", "top", url, "--once", "--interval", "0.5"]
    done = subprocess.run(command, env=environment(COLUMNS="100"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = metrics(url)
    drafts = found["vllm:spec_decode_num_drafts"]
    length = 1 + found["vllm:spec_decode_num_accepted_tokens"] / drafts
    first = 100 * found["vllm:spec_decode_num_accepted_tokens_per_pos[0]"] / drafts
    assert f"acceptance length        - now, {length:.2f} in all" in done.stdout
    assert re.search(rf" 0  \S+ +{first:.1f} %", done.stdout), done.stdout


def test_chat(server):
    """The chat template of the shipped tokenizer, through the chat API."""
    url, _ = server
    body = {
        "model": "tiny", "max_tokens": 32, "temperature": 0,
        "messages": [{"role": "user", "content": "def read_lines(path):"}],
    }  # fmt: skip
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()
    assert reply["usage"]["completion_tokens"] > 0
    assert reply["choices"][0]["message"]["content"]
