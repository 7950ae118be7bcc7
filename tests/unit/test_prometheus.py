# SPDX-License-Identifier: Apache-2.0
"""Our metrics in vLLM's registry, through vLLM's own stat logger; in this process, and over several."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.spec_decode.metrics import SpecDecodingProm, SpecDecodingStats

from tests.helpers import drafter_config
from vllm_dflash.compat import ownership, patching
from vllm_dflash.compat.metrics import prometheus, wire
from vllm_dflash.compat.metrics.fallbacks import Fallback
from vllm_dflash.compat.metrics.report import BudgetInForce, StepReport, StepTimes
from vllm_dflash.config import DFlashConfig

LABELS = {"model_name": "tiny", "engine": "0"}


@pytest.fixture
def made_by(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What vLLM's stat logger makes for its metrics of speculation."""
    monkeypatch.setattr(patching, "_originals", {})
    monkeypatch.setattr(PrometheusStatLogger, "_spec_decoding_cls", SpecDecodingProm)
    prometheus.install(SimpleNamespace(PrometheusStatLogger=PrometheusStatLogger))  # type: ignore[arg-type]

    def make(speculative: Any, engines: tuple[int, ...] = (0,)) -> Any:
        unregister_vllm_metrics()  # as the logger does first
        labels: dict[int, list[object]] = {index: ["tiny", str(index)] for index in engines}
        return PrometheusStatLogger._spec_decoding_cls(
            speculative, ["model_name", "engine"], labels, is_diffusion=False
        )

    yield make
    unregister_vllm_metrics()
    prometheus.unregister()


def speculative_config(num_tokens: int = 3, trees: bool = False, ours: bool = True) -> Any:
    draft = SimpleNamespace(hf_config=SimpleNamespace())
    config: Any = SimpleNamespace(
        method="dflash", draft_model_config=draft, draft_tensor_parallel_size=1, num_speculative_tokens=num_tokens
    )
    if ours:
        drafter = DFlashConfig.from_dict(drafter_config(block_size=4), source="drafter")
        ownership.claim(config, drafter, None, num_tokens if trees else None, is_auto=trees)
    return config


def stats_of(num_tokens: int, drafts: list[tuple[int, int]], report: StepReport | None = None) -> SpecDecodingStats:
    stats = SpecDecodingStats.new(num_tokens)
    for count, accepted in drafts:
        stats.observe_draft(count, accepted)
    if report is not None:
        stats.num_draft_tokens_per_pos += wire.encode(report)
    return stats


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, LABELS | labels)


def by_position(name: str, count: int) -> list[float | None]:
    return [value(name, position=str(place)) for place in range(count)]


def test_drafts_of_varying_length(made_by: Any) -> None:
    """Three drafts of 3, 2 and 1 tokens, of which 2, 2 and 0 were accepted."""
    prom = made_by(speculative_config())
    prom.observe(stats_of(3, [(3, 2), (2, 2)], StepReport()))
    prom.observe(stats_of(3, [(1, 0)], StepReport()))
    assert value("vllm_dflash:spec_decode_num_drafts_total") == 3
    assert by_position("vllm_dflash:spec_decode_num_draft_tokens_per_pos_total", 4) == [3, 2, 1, None]
    assert by_position("vllm_dflash:spec_decode_num_accepted_tokens_per_pos_total", 4) == [2, 2, 0, None]
    assert value("vllm_dflash:spec_decode_num_verified_nodes_total") == 6
    # vLLM's own are there as ever.
    assert value("vllm:spec_decode_num_drafts_total") == 3
    assert by_position("vllm:spec_decode_num_accepted_tokens_per_pos_total", 3) == [2, 2, 0]


def test_counters_of_nothing_are_left_alone(made_by: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 15 positions most are accepted at few steps, and each call costs time at every one."""
    prom = made_by(speculative_config())
    added: list[float] = []
    counters = [*prom.dflash[0]._accepted, *prom.dflash[0]._drafted]
    for counter in counters:
        monkeypatch.setattr(counter, "inc", added.append)
    prom.observe(stats_of(3, [(2, 1)], StepReport()))
    assert added == [1, 1, 1]


def test_drafts_of_which_nothing_was_verified(made_by: Any) -> None:
    """Two of three, as when a grammar takes all tokens of a draft."""
    made_by(speculative_config()).observe(stats_of(3, [(0, 0), (3, 2), (0, 0)], StepReport()))
    assert value("vllm:spec_decode_num_drafts_total") == 3
    assert value("vllm_dflash:spec_decode_num_drafts_total") == 1


def test_times_and_fallbacks(made_by: Any) -> None:
    prom = made_by(speculative_config())
    assert value("vllm_dflash:fallbacks_total", reason="no_graph") == 0
    counts = Counter({Fallback.NO_GRAPH: 2, Fallback.HYBRID_TARGET: 1})
    prom.observe(stats_of(3, [(3, 0)], StepReport(StepTimes(4000, 1500), None, None, counts)))
    prom.observe(stats_of(3, [(3, 0)], StepReport(StepTimes(6000, 500))))
    prom.observe(stats_of(3, [(3, 0)]))
    assert value("vllm_dflash:fallbacks_total", reason="no_graph") == 2
    assert value("vllm_dflash:fallbacks_total", reason="hybrid_target") == 1
    assert value("vllm_dflash:verify_time_seconds_count") == 2
    assert value("vllm_dflash:verify_time_seconds_sum") == pytest.approx(0.010)
    assert value("vllm_dflash:draft_time_seconds_sum") == pytest.approx(0.002)
    assert value("vllm_dflash:draft_time_seconds_bucket", le="0.0005") == 1
    assert value("vllm_dflash:tree_budget_nodes") is None


def test_the_interval_of_prompts(made_by: Any) -> None:
    prom = made_by(speculative_config())
    assert value("vllm_dflash:prefill_schedule_interval") == 1
    for report in (StepReport(prefill_schedule_interval=6), StepReport()):
        prom.observe(stats_of(3, [(3, 0)], report))
        assert value("vllm_dflash:prefill_schedule_interval") == 6


def test_trees_that_follow_the_load(made_by: Any) -> None:
    """Six nodes, three depths."""
    prom = made_by(speculative_config(6, trees=True))
    prom.observe(stats_of(6, [(6, 3)], StepReport(budget=BudgetInForce(10, 4))))
    assert value("vllm_dflash:tree_budget_nodes") == 10
    assert value("vllm_dflash:tree_budget_requests") == 4
    assert value("vllm_dflash:tree_budget_nodes_per_request") == 2.5
    prom.observe(stats_of(6, [(6, 3)], StepReport(budget=BudgetInForce(0, 0))))
    assert value("vllm_dflash:tree_budget_nodes_per_request") == 0
    assert by_position("vllm_dflash:spec_decode_num_accepted_tokens_per_pos_total", 4) == [2, 2, 2, None]
    assert by_position("vllm:spec_decode_num_accepted_tokens_per_pos_total", 7) == [2, 2, 2, 0, 0, 0, None]
    assert len(prom.counter_spec_decode_num_accepted_tokens_per_pos[0]) == 3  # no step touches the others


def test_engines_apart(made_by: Any) -> None:
    """As with data parallelism: each has its label."""
    prom = made_by(speculative_config(), engines=(0, 1))
    prom.observe(stats_of(3, [(3, 1)], StepReport()), 1)
    assert value("vllm_dflash:spec_decode_num_drafts_total", engine="1") == 1
    assert value("vllm_dflash:spec_decode_num_drafts_total", engine="0") == 0


def test_one_engine_after_the_other(made_by: Any) -> None:
    made_by(speculative_config()).observe(stats_of(3, [(3, 1)], StepReport()))
    made_by(speculative_config())
    assert value("vllm_dflash:spec_decode_num_drafts_total") == 0


@pytest.mark.parametrize("speculative", [None, speculative_config(ours=False)], ids=["none", "vLLM's own"])
def test_other_engines_show_nothing_of_ours(made_by: Any, speculative: Any) -> None:
    made_by(speculative_config())
    made_by(speculative).observe(stats_of(3, [(3, 1)]))
    assert not [family.name for family in REGISTRY.collect() if family.name.startswith("vllm_dflash")]


def test_ray_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's classes take the same arguments; its own logger is the one that is patched."""
    from vllm.v1.metrics import ray_wrappers

    seen: dict[str, float] = {}

    class Metric:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...], boundaries: Any = None) -> None:
            self.name, self._tag_keys = name, tag_keys

        def note(self, amount: float, tags: dict[str, str]) -> None:
            assert set(tags) == set(self._tag_keys)
            key = self.name + "".join(f" {name}={tags[name]}" for name in tags if name in ("position", "reason"))
            seen[key] = seen.get(key, 0.0) + amount

        inc = observe = set = note

    fake = SimpleNamespace(Counter=Metric, Gauge=Metric, Histogram=Metric, Metric=Metric)
    monkeypatch.setattr(ray_wrappers, "ray_metrics", fake)
    monkeypatch.setattr(patching, "_originals", {})
    monkeypatch.setattr(ray_wrappers.RayPrometheusStatLogger, "_spec_decoding_cls", ray_wrappers.RaySpecDecodingProm)
    prometheus.install_ray(ray_wrappers)
    make: Any = ray_wrappers.RayPrometheusStatLogger._spec_decoding_cls
    prom = make(speculative_config(), ["model_name", "engine"], {0: ["tiny", "0"]}, is_diffusion=False)
    counts = Counter({Fallback.NO_GRAPH: 2})
    prom.observe(stats_of(3, [(3, 1), (1, 1)], StepReport(StepTimes(4000, 1500), None, None, counts)))
    assert seen["vllm_dflash_spec_decode_num_drafts"] == 2
    assert seen["vllm_dflash_spec_decode_num_draft_tokens_per_pos position=1"] == 1
    assert seen["vllm_dflash_fallbacks reason=no_graph"] == 2
    assert seen["vllm_dflash_draft_time_seconds"] == pytest.approx(0.0015)


#: Processes of which each reads the number of nodes that its steps verified, one after the other; then all is shown.
SERVING = """
    import os
    from prometheus_client import generate_latest
    from tests.unit.test_prometheus import *
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    patching._originals.clear()
    PrometheusStatLogger._spec_decoding_cls = SpecDecodingProm
    prometheus.install(SimpleNamespace(PrometheusStatLogger=PrometheusStatLogger))
    for steps in ((3, 4), (5,)):
        child = os.fork()
        if not child:
            make, labels = PrometheusStatLogger._spec_decoding_cls, {0: ["tiny", "0"]}
            prom = make(speculative_config(6, trees=True), ["model_name", "engine"], labels)
            for nodes in steps:
                prom.observe(stats_of(6, [(3, 1)], StepReport(StepTimes(1000, 1000), BudgetInForce(nodes, 1))))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    print(generate_latest(get_prometheus_registry()).decode())
"""


def test_processes_that_serve_together(tmp_path: Path) -> None:
    """Counters add up, a gauge is the last one's; the processes themselves are over."""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, "-c", textwrap.dedent(SERVING)]
    done = subprocess.run(command, check=True, timeout=300, env=environment, capture_output=True, text=True)
    found = {
        (sample.name, sample.labels.get("position")): sample.value
        for family in text_string_to_metric_families(done.stdout)
        for sample in family.samples
    }
    assert found["vllm_dflash:spec_decode_num_drafts_total", None] == 3
    assert found["vllm_dflash:spec_decode_num_accepted_tokens_per_pos_total", "0"] == 3
    assert found["vllm_dflash:verify_time_seconds_count", None] == 3
    assert found["vllm_dflash:tree_budget_nodes", None] == 5
