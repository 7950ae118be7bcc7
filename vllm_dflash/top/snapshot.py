# SPDX-License-Identifier: Apache-2.0
"""What one page of /metrics says, summed over engines. Pure arithmetic.

Counters count since the server's start. What a server without the plugin does not tell is empty or None.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields
from typing import Any

VLLM, PLUGIN = "vllm:", "vllm_dflash:"
#: The same on Ray's pages, where the series of a node's replicas stand side by side. The longer one first.
_RAY = {"ray_vllm_dflash_": PLUGIN, "ray_vllm_": VLLM}


class NotVllmError(ValueError):
    """The page is not that of a vLLM server. The message says what it is instead."""


@dataclass(frozen=True)
class Counters:
    """What only grows while a server runs."""

    output_tokens: float = 0.0
    prompt_tokens: float = 0.0
    preemptions: float = 0.0
    prefix_queries: float = 0.0  # tokens
    prefix_hits: float = 0.0
    drafts: float = 0.0
    drafted: float = 0.0
    accepted: float = 0.0
    accepted_per_position: tuple[float, ...] = ()
    drafted_per_position: tuple[float, ...] = ()
    timed_steps: float = 0.0
    verify_seconds: float = 0.0
    draft_seconds: float = 0.0
    fallbacks: tuple[tuple[str, float], ...] = ()  # by reason

    def __sub__(self, earlier: Counters) -> Counters:
        """What came since. A counter that was not there before counts from 0."""
        return Counters(**{f.name: _minus(getattr(self, f.name), getattr(earlier, f.name)) for f in fields(self)})

    def is_behind(self, earlier: Counters) -> bool:
        """Whether a counter has fallen: the server is another one."""
        return any(number < 0 for number in _flat(self - earlier))

    @property
    def acceptance_length(self) -> float | None:
        """1 + accepted / drafts, pooled, bonus token included; None if nothing was drafted."""
        return 1 + self.accepted / self.drafts if self.drafts else None

    @property
    def position_rates(self) -> tuple[float | None, ...]:
        """Accepted / drafted at each position; by all drafts where the server does not count shorter ones apart."""
        drafted = self.drafted_per_position or (self.drafts,) * len(self.accepted_per_position)
        pairs = zip(self.accepted_per_position, drafted, strict=False)
        return tuple(accepted / count if count else None for accepted, count in pairs)

    @property
    def hit_rate(self) -> float | None:
        """Share of a prompt's tokens that the prefix cache had; None if none was looked for."""
        return self.prefix_hits / self.prefix_queries if self.prefix_queries else None


@dataclass(frozen=True)
class Snapshot:
    """One page."""

    at: float  # seconds, of a clock that only goes forward
    counters: Counters
    running: float
    waiting: float
    kv_usage: float  # 0 to 1, the fullest engine's
    models: tuple[str, ...]
    num_engines: int
    started: float | None  # the server's start in Unix time
    has_plugin: bool  # and a DFlash drafter of its own
    has_speculation: bool
    prefill_interval: float = 1.0  # prompts are admitted every so many steps, the largest of the engines'
    budget: tuple[float, float] | None = None  # nodes and requests of the last step, with "tree": "auto"


def _minus(now: Any, then: Any) -> Any:
    if isinstance(now, float):
        return now - then
    if now and isinstance(now[0], tuple):
        before = dict(then)
        return tuple((name, count - before.get(name, 0.0)) for name, count in now)
    return tuple(count - (then[place] if place < len(then) else 0.0) for place, count in enumerate(now))


def _flat(counters: Counters) -> list[float]:
    found: list[float] = []
    for f in fields(counters):
        value = getattr(counters, f.name)
        found += [value] if isinstance(value, float) else [v[1] if isinstance(v, tuple) else v for v in value]
    return found


class _Page:
    """Samples by vLLM's names."""

    def __init__(self, text: str) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        self.samples: dict[str, list[Any]] = defaultdict(list)
        try:
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    self.samples[_vllm_name(sample.name)].append(sample)
        except (ValueError, KeyError) as error:
            raise NotVllmError(f"not Prometheus' text format ({error})") from error

    def sum(self, name: str) -> float:
        return float(sum(sample.value for sample in self.samples.get(name, ())))

    def most(self, name: str) -> float:
        return float(max((sample.value for sample in self.samples.get(name, ())), default=0.0))

    def labels(self, name: str, *labels: str) -> list[tuple[str, ...]]:
        found = {tuple(sample.labels.get(label, "") for label in labels) for sample in self.samples.get(name, ())}
        return sorted(found)

    def by(self, name: str, label: str) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for sample in self.samples.get(name, ()):
            found[sample.labels[label]] += sample.value
        return found

    def by_position(self, name: str) -> tuple[float, ...]:
        found = self.by(name, "position")
        return tuple(found[place] for place in sorted(found, key=int))


def _vllm_name(name: str) -> str:
    """Ray's name of a metric as vLLM has it; any other as it is."""
    for theirs, ours in _RAY.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def parse(text: str, at: float) -> Snapshot:
    """Read one page. Raises NotVllmError where it has no metric of vLLM's."""
    page = _Page(text)
    if not any(name.startswith(VLLM) for name in page.samples):
        raise NotVllmError(
            f"no metric whose name begins with {VLLM} among its {len(page.samples)} (nor has vLLM with "
            "--disable-log-stats)"
        )
    starts = page.samples.get("process_start_time_seconds")
    has_plugin = f"{PLUGIN}spec_decode_num_drafts_total" in page.samples
    running = f"{VLLM}num_requests_running"
    return Snapshot(
        at=at,
        counters=_counters(page, has_plugin),
        running=page.sum(running),
        waiting=page.sum(f"{VLLM}num_requests_waiting"),
        kv_usage=page.most(f"{VLLM}kv_cache_usage_perc"),
        models=tuple(model for (model,) in page.labels(running, "model_name")),
        num_engines=max(1, len(page.labels(running, "engine", "ReplicaId"))),
        started=starts[0].value if starts else None,
        has_plugin=has_plugin,
        has_speculation=f"{VLLM}spec_decode_num_drafts_total" in page.samples,
        prefill_interval=max(1.0, page.most(f"{PLUGIN}prefill_schedule_interval")),
        budget=_budget(page),
    )


def _counters(page: _Page, has_plugin: bool) -> Counters:
    owner = PLUGIN if has_plugin else VLLM
    return Counters(
        output_tokens=page.sum(f"{VLLM}generation_tokens_total"),
        prompt_tokens=page.sum(f"{VLLM}prompt_tokens_total"),
        preemptions=page.sum(f"{VLLM}num_preemptions_total"),
        prefix_queries=page.sum(f"{VLLM}prefix_cache_queries_total"),
        prefix_hits=page.sum(f"{VLLM}prefix_cache_hits_total"),
        # vLLM's counts drafts of which nothing was verified as well.
        drafts=page.sum(f"{owner}spec_decode_num_drafts_total"),
        drafted=page.sum(f"{VLLM}spec_decode_num_draft_tokens_total"),
        accepted=page.sum(f"{VLLM}spec_decode_num_accepted_tokens_total"),
        accepted_per_position=page.by_position(f"{owner}spec_decode_num_accepted_tokens_per_pos_total"),
        drafted_per_position=page.by_position(f"{PLUGIN}spec_decode_num_draft_tokens_per_pos_total"),
        timed_steps=page.sum(f"{PLUGIN}draft_time_seconds_count"),
        verify_seconds=page.sum(f"{PLUGIN}verify_time_seconds_sum"),
        draft_seconds=page.sum(f"{PLUGIN}draft_time_seconds_sum"),
        fallbacks=tuple(sorted(page.by(f"{PLUGIN}fallbacks_total", "reason").items())),
    )


def _budget(page: _Page) -> tuple[float, float] | None:
    if f"{PLUGIN}tree_budget_nodes" not in page.samples:
        return None
    return page.sum(f"{PLUGIN}tree_budget_nodes"), page.sum(f"{PLUGIN}tree_budget_requests")
