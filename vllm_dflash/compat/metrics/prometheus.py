# SPDX-License-Identifier: Apache-2.0
"""The metrics themselves, in every process that serves /metrics.

Patch: `_spec_decoding_cls` of vLLM's `PrometheusStatLogger`, and of its subclass for Ray. Reason: vLLM takes loggers of
plugins in `vllm serve` alone, not in `LLM(...)`, and these see none of its labels. Added: metrics named
`vllm_dflash:...` for engines of ours, beside vLLM's own and with their labels. Removable when vLLM offers its labels to
stat loggers of plugins, offline as well.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from prometheus_client import REGISTRY

from vllm_dflash.compat import patching
from vllm_dflash.compat.metrics import wire
from vllm_dflash.compat.metrics.fallbacks import Fallback
from vllm_dflash.compat.metrics.report import StepReport
from vllm_dflash.compat.ownership import is_ours, tree_shape

PREFIX = "vllm_dflash:"
#: Of steps, in seconds.
_BUCKETS = [
    0.0002,
    0.0005,
    0.001,
    0.002,
    0.003,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.2,
    0.5,
    1.0,
]


def install(loggers: ModuleType) -> None:
    """Patch `vllm.v1.metrics.loggers`."""
    _replace_in(loggers.PrometheusStatLogger)


def install_ray(ray_wrappers: ModuleType) -> None:
    """Patch `vllm.v1.metrics.ray_wrappers`."""
    _replace_in(ray_wrappers.RayPrometheusStatLogger)


def _replace_in(logger_class: Any) -> None:
    theirs = logger_class._spec_decoding_cls

    class WithDFlash(theirs):  # type: ignore[misc, valid-type]
        """vLLM's metrics of speculation, and ours. Same signatures."""

        def __init__(
            self,
            speculative_config: Any,
            labelnames: list[str],
            per_engine_labelvalues: dict[int, list[Any]],
            **options: Any,
        ) -> None:
            super().__init__(speculative_config, labelnames, per_engine_labelvalues, **options)
            unregister()
            self.dflash: dict[int, EngineMetrics] = {}
            if is_ours(speculative_config):
                shape = tree_shape(speculative_config)
                positions = shape.num_depths if shape else speculative_config.num_speculative_tokens
                # A tree has more nodes than depths, and every counter costs the host time at each step.
                for counters in self.counter_spec_decode_num_accepted_tokens_per_pos.values():
                    del counters[positions:]
                families = Families(logger_class, labelnames, is_auto=shape is not None and shape.is_auto)
                self.dflash = {
                    index: EngineMetrics(families, labels, positions)
                    for index, labels in per_engine_labelvalues.items()
                }

        def observe(self, spec_decoding_stats: Any, engine_idx: int = 0) -> None:
            super().observe(spec_decoding_stats, engine_idx)
            if engine_idx in self.dflash:
                self.dflash[engine_idx].observe(spec_decoding_stats)

    patching.replace(logger_class, "_spec_decoding_cls", WithDFlash)


def unregister() -> None:
    """Forget the metrics of an engine before this one, as vLLM does with its own."""
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith(PREFIX):
            REGISTRY.unregister(collector)


class Families:
    """Our metrics without their labels' values."""

    def __init__(self, logger_class: Any, labelnames: list[str], is_auto: bool) -> None:
        def make(kind: Any, name: str, text: str, *more: str, **options: Any) -> Any:
            return kind(name=PREFIX + name, documentation=text, labelnames=[*labelnames, *more], **options)

        counter, gauge, histogram = logger_class._counter_cls, logger_class._gauge_cls, logger_class._histogram_cls
        self.drafts = make(counter, "spec_decode_num_drafts", "Drafts of which a token was verified.")
        self.drafted = make(
            counter, "spec_decode_num_draft_tokens_per_pos", "Drafts that had a token at the position.", "position"
        )
        self.accepted = make(
            counter, "spec_decode_num_accepted_tokens_per_pos", "Accepted tokens at the position.", "position"
        )
        self.nodes = make(counter, "spec_decode_num_verified_nodes", "Draft tokens, or nodes of trees, verified.")
        self.fallbacks = make(counter, "fallbacks", "Times that less was done than asked for, by reason.", "reason")
        self.verify = make(
            histogram, "verify_time_seconds", "From a verifying step's start to its drafting.", buckets=_BUCKETS
        )
        self.draft = make(histogram, "draft_time_seconds", "Drafting in a verifying step.", buckets=_BUCKETS)
        recent: dict[str, Any] = {"multiprocess_mode": "mostrecent"}
        self.interval = make(gauge, "prefill_schedule_interval", "Prompts are admitted every so many steps.", **recent)
        self.budget: tuple[Any, ...] = ()
        if is_auto:
            self.budget = (
                make(gauge, "tree_budget_nodes", "Nodes that the last step verified, of all requests.", **recent),
                make(gauge, "tree_budget_nodes_per_request", "The same a request.", **recent),
                make(gauge, "tree_budget_requests", "Requests of that step.", **recent),
            )


class EngineMetrics:
    """Those of one engine, all there from the start: a rate of what has not happened yet is 0."""

    def __init__(self, families: Families, labels: list[Any], num_positions: int) -> None:
        positions = [str(position) for position in range(num_positions)]
        self._drafts, self._nodes = families.drafts.labels(*labels), families.nodes.labels(*labels)
        self._drafted = [families.drafted.labels(*labels, position) for position in positions]
        self._accepted = [families.accepted.labels(*labels, position) for position in positions]
        self._fallbacks = {reason: families.fallbacks.labels(*labels, reason.value) for reason in Fallback}
        self._verify, self._draft = families.verify.labels(*labels), families.draft.labels(*labels)
        self._interval = families.interval.labels(*labels)
        self._interval.set(1)
        self._budget = [gauge.labels(*labels) for gauge in families.budget]

    def observe(self, stats: Any) -> None:
        """One step, as vLLM's SpecDecodingStats have it."""
        self._drafts.inc(stats.num_draft_tokens_per_pos[0])  # `num_drafts` counts those of which nothing was verified
        self._nodes.inc(stats.num_draft_tokens)
        _add(self._accepted, stats.num_accepted_tokens_per_pos)
        _add(self._drafted, stats.num_draft_tokens_per_pos)
        report = wire.decode(stats.num_draft_tokens_per_pos[stats.num_spec_tokens :])
        if report is not None:
            self._observe(report)

    def _observe(self, report: StepReport) -> None:
        for reason, count in report.fallbacks.items():
            self._fallbacks[reason].inc(count)
        if report.times is not None:
            self._verify.observe(report.times.verify_us / 1e6)
            self._draft.observe(report.times.draft_us / 1e6)
        if report.prefill_schedule_interval is not None:
            self._interval.set(report.prefill_schedule_interval)
        if report.budget is not None and self._budget:
            nodes, requests = report.budget
            for gauge, value in zip(
                self._budget, (nodes, nodes / requests if requests else 0.0, requests), strict=True
            ):
                gauge.set(value)


def _add(counters: list[Any], counts: list[int]) -> None:
    """To each counter its count. There may be more of these."""
    for counter, count in zip(counters, counts, strict=False):
        if count:  # at most steps most are 0
            counter.inc(count)
