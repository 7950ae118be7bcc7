# SPDX-License-Identifier: Apache-2.0
"""A server's own counters, from the text of its `/metrics`. Summed over engines; names are vLLM's, or this plugin's.

`vllm_dflash:spec_decode_num_draft_tokens_per_pos` counts the drafts that had a token at each position. vLLM does not
count them, so that without it position rates divide by all drafts.
"""

from __future__ import annotations

from collections import defaultdict

from vllm_dflash.benchmark.metrics import AcceptanceCounts
from vllm_dflash.benchmark.records import Counters

SPECULATION = "vllm:spec_decode_num_"
DRAFTED_PER_POSITION = "vllm_dflash:spec_decode_num_draft_tokens_per_pos"
Samples = dict[str, dict[str, float]]  # by name of the counter and position; position "" where there is none


def parse_counters(text: str, model: str | None = None) -> Counters:
    """model: only the samples with this model_name, where a sample has one. Raises ValueError for another format."""
    from prometheus_client.parser import text_string_to_metric_families

    found: Samples = defaultdict(lambda: defaultdict(float))
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            other_model = model is not None and sample.labels.get("model_name", model) != model
            if family.type == "counter" and sample.name.endswith("_total") and not other_model:
                found[family.name][sample.labels.get("position", "")] += sample.value
    return Counters(
        acceptance=_acceptance(found),
        output_tokens=_single(found, "vllm:generation_tokens"),
        preemptions=_single(found, "vllm:num_preemptions"),
        prefix_cache_queries=_single(found, "vllm:prefix_cache_queries"),
        prefix_cache_hits=_single(found, "vllm:prefix_cache_hits"),
    )


def _single(found: Samples, name: str) -> int | None:
    return int(sum(found[name].values())) if name in found else None


def _positions(found: Samples, name: str) -> tuple[int, ...] | None:
    if name not in found:
        return None
    return tuple(int(found[name][position]) for position in sorted(found[name], key=int))


def _acceptance(found: Samples) -> AcceptanceCounts | None:
    """None for a server that does not speculate."""
    drafts = _single(found, f"{SPECULATION}drafts")
    drafted = _single(found, f"{SPECULATION}draft_tokens")
    accepted = _single(found, f"{SPECULATION}accepted_tokens")
    per_position = _positions(found, f"{SPECULATION}accepted_tokens_per_pos")
    if drafts is None or drafted is None or accepted is None or per_position is None:
        return None
    reached = _positions(found, DRAFTED_PER_POSITION)
    if reached is not None:  # a position that was never drafted may have no sample yet
        reached = (reached + (0,) * len(per_position))[: len(per_position)]
    return AcceptanceCounts(drafts, drafted, accepted, per_position, reached)
