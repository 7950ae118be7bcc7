# SPDX-License-Identifier: Apache-2.0
"""A server's own counters, from the text of its `/metrics`. Summed over engines; names are vLLM's, or this plugin's.

`vllm_dflash:spec_decode_num_draft_tokens_per_pos` counts the drafts that had a token at each position. vLLM does not
count them, so that without it position rates divide by all drafts. Its `num_drafts` also counts drafts of which nothing
was verified, which `vllm_dflash:spec_decode_num_drafts` leaves out.
"""

from __future__ import annotations

from collections import defaultdict

from vllm_dflash.benchmark.metrics import AcceptanceCounts
from vllm_dflash.benchmark.records import Counters

SPECULATION, OURS = "vllm:spec_decode_num_", "vllm_dflash:spec_decode_num_"
Samples = dict[str, dict[int, float]]  # by name of the counter and position; 0 where a counter has no positions


def parse_counters(text: str, model: str | None = None) -> Counters:
    """model: only the samples with this model_name, where a sample has one. Raises ValueError for another format."""
    from prometheus_client.parser import text_string_to_metric_families

    found: Samples = {}
    for family in text_string_to_metric_families(text):
        if family.type != "counter":
            continue
        counted = found.setdefault(family.name, defaultdict(float))  # empty before anything was counted
        for sample in family.samples:
            other_model = model is not None and sample.labels.get("model_name", model) != model
            if sample.name.endswith("_total") and not other_model:
                counted[int(sample.labels.get("position", 0))] += sample.value
    return Counters(
        acceptance=_acceptance(found),
        output_tokens=_single(found, "vllm:generation_tokens"),
        preemptions=_single(found, "vllm:num_preemptions"),
        prefix_cache_queries=_single(found, "vllm:prefix_cache_queries"),
        prefix_cache_hits=_single(found, "vllm:prefix_cache_hits"),
    )


def counted_models(text: str) -> list[str]:
    """The models whose work vLLM's counters hold: of each the first of its served names. Raises as parse_counters."""
    from prometheus_client.parser import text_string_to_metric_families

    families = [family for family in text_string_to_metric_families(text) if family.name.startswith("vllm:")]
    names = {sample.labels.get("model_name") for family in families for sample in family.samples}
    return sorted(name for name in names if name)


def _single(found: Samples, name: str) -> int | None:
    return int(sum(found[name].values())) if name in found else None


def _acceptance(found: Samples) -> AcceptanceCounts | None:
    """None for a server that does not speculate."""
    drafts = _single(found, f"{OURS}drafts" if f"{OURS}drafts" in found else f"{SPECULATION}drafts")
    drafted = _single(found, f"{SPECULATION}draft_tokens")
    accepted = _single(found, f"{SPECULATION}accepted_tokens")
    per_position = found.get(f"{SPECULATION}accepted_tokens_per_pos")
    if drafts is None or drafted is None or accepted is None or not per_position:
        return None
    positions = range(max(per_position) + 1)
    reached = found.get(f"{OURS}draft_tokens_per_pos")
    return AcceptanceCounts(
        drafts,
        drafted,
        accepted,
        tuple(int(per_position.get(position, 0)) for position in positions),
        None if reached is None else tuple(int(reached.get(position, 0)) for position in positions),
    )
