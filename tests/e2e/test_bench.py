# SPDX-License-Identifier: Apache-2.0
"""`vllm-dflash bench` on real engines: what it says is what the server's own counters and Transformers say."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from tests.e2e.engines import environment
from tests.e2e.serving import serving
from vllm_dflash.benchmark.results import Results, load_results
from vllm_dflash.cli import app

pytestmark = pytest.mark.engine

SAMPLE = re.compile(r'^(vllm:\w+)_total\{(?:[^}]*?position="(\d+)")?[^}]*\} (\S+)$')
ONE_RUN = ("--max-tokens", "40", "--num-prompts", "6", "--seed", "11", "--warm-up", "0")


def bench(folder: Path, *arguments: str) -> Results:
    output = folder / "results.json"
    found = CliRunner().invoke(app, ["bench", *arguments, "--output", str(output), "--report", f"{folder}/report.html"])
    assert found.exit_code == 0, found.output
    assert (folder / "report.html").stat().st_size > 10_000
    return load_results(output)


def counters(url: str) -> dict[tuple[str, str], float]:
    """By name and position, read from the server's text without any of the code under test."""
    found: dict[tuple[str, str], float] = defaultdict(float)
    for line in httpx.get(f"{url}/metrics", timeout=10).text.splitlines():
        if match := SAMPLE.match(line):
            found[match[1], match[2] or ""] += float(match[3])
    return found


def test_the_numbers_equal_the_servers_own_counters(tmp_path: Path) -> None:
    """Several turns among the prompts, two requests at once; vLLM counts per request as well."""
    figures = ("--per-request-spec-decode-metrics", "summary")
    with serving(tmp_path, *figures, "--enforce-eager") as (url, _):
        before = counters(url)
        saved = bench(tmp_path, "--base-url", url, "--concurrency", "2", *ONE_RUN)
        after = counters(url)

    def moved(name: str, position: str = "") -> float:
        return after[name, position] - before[name, position]

    (run,), (summary,) = saved.runs, saved.summaries
    assert summary.errors == {} and run.notes[1:] == ()
    assert len({record.name for record in run.requests}) == 6 < len(run.requests)  # some have several turns
    assert summary.output_tokens == moved("vllm:generation_tokens") > 6 * 20
    drafts, accepted = moved("vllm:spec_decode_num_drafts"), moved("vllm:spec_decode_num_accepted_tokens")
    assert drafts > 50
    assert summary.acceptance_length_pooled == 1 + accepted / drafts > 1.5
    assert summary.acceptance_rate == accepted / moved("vllm:spec_decode_num_draft_tokens")
    per_position = [moved("vllm:spec_decode_num_accepted_tokens_per_pos", str(position)) for position in range(15)]
    counts = run.counters and run.counters.acceptance
    assert counts is not None
    assert list(counts.accepted_per_position) == per_position
    assert summary.prefix_cache_hit_rate == moved("vllm:prefix_cache_hits") / moved("vllm:prefix_cache_queries")
    assert summary.preemptions == moved("vllm:num_preemptions")

    # The figures that came with the responses are of the same drafts.
    told = [record.acceptance for record in run.requests]
    assert sum(one.drafts or 0 for one in told if one) == drafts
    assert sum(one.accepted or 0 for one in told if one) == accepted
    lengths = [one.mean_length for one in told if one]
    assert summary.acceptance_length_of_responses == pytest.approx(sum(lengths) / len(run.requests))


def test_an_engine_of_its_own_and_transformers_accept_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and in float32: the same text and the same drafts, on vLLM and on Transformers."""
    for name, value in environment(VLLM_ENABLE_V1_MULTIPROCESSING="0").items():
        monkeypatch.setenv(name, value)
    (tmp_path / "vllm").mkdir()
    engines = bench(
        tmp_path / "vllm", "--backend", "offline", "--dtype", "float32", "--concurrency", "1,3",
        "--engine-args", '{"enforce_eager": true}', "--system", "plain", "--system", "vllm_dflash", *ONE_RUN,
    )  # fmt: skip
    oracle = bench(tmp_path, "--backend", "transformers", "--dtype", "float32", *ONE_RUN)

    plain_1, plain_3, ours_1, ours_3 = engines.summaries
    generate, spec_generate = oracle.summaries
    tokens = {s.output_tokens for s in (*engines.summaries, *oracle.summaries)}
    assert len(tokens) == 1 and tokens.pop() > 6 * 20
    assert [s.system for s in engines.summaries] == ["no speculation"] * 2 + ["vllm_dflash"] * 2
    assert plain_1.acceptance_length_pooled is None and generate.acceptance_length_pooled is None
    assert spec_generate.acceptance_length_pooled is not None
    for ours in (ours_1, ours_3):
        # The engine drafts less where a response's end is near, so only nearly the same.
        assert ours.acceptance_length_pooled == pytest.approx(spec_generate.acceptance_length_pooled, rel=0.03)
        assert ours.speedup is not None and ours.speedup > 0
    assert ours_1.ttft is not None and ours_3.ttft is not None and plain_3.tpot is not None
