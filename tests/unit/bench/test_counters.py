# SPDX-License-Identifier: Apache-2.0
"""A server's counters, from the text that Prometheus gets."""

from __future__ import annotations

import pytest

from vllm_dflash.benchmark.clients.counters import counted_models, parse_counters
from vllm_dflash.benchmark.metrics import AcceptanceCounts
from vllm_dflash.benchmark.records import Counters

VLLM = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 4.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 2.0
# TYPE vllm:spec_decode_num_drafts_created gauge
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.7e+09
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 12.0
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 5.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="2"} 1.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 2.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 1.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="0"} 3.0
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="m"} 40.0
vllm:generation_tokens_total{engine="0",model_name="other"} 1000.0
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="m"} 2.0
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 100.0
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 64.0
"""
OURS = """\
# TYPE vllm_dflash:spec_decode_num_draft_tokens_per_pos_total counter
vllm_dflash:spec_decode_num_draft_tokens_per_pos_total{engine="0",model_name="m",position="0"} 6.0
vllm_dflash:spec_decode_num_draft_tokens_per_pos_total{engine="0",model_name="m",position="1"} 5.0
"""


def test_counters_are_summed_over_engines_and_read_for_one_model() -> None:
    acceptance = AcceptanceCounts(6, 12, 5, (4, 2, 1))
    assert parse_counters(VLLM, "m") == Counters(acceptance, 40, 2, 100, 64)
    assert parse_counters(VLLM).output_tokens == 1040


def test_drafts_that_reach_a_position_are_read_where_they_are_counted() -> None:
    found = parse_counters(VLLM + OURS, "m").acceptance
    assert found is not None
    assert found.drafted_per_position == (6, 5, 0)


def test_drafts_of_which_nothing_was_verified_are_none_where_that_is_known() -> None:
    """Six drafts by vLLM's counter, five by the plugin's: one verified nothing."""
    ours = """\
# TYPE vllm_dflash:spec_decode_num_drafts_total counter
vllm_dflash:spec_decode_num_drafts_total{engine="0",model_name="m"} 5.0
"""
    found = parse_counters(VLLM + ours, "m").acceptance
    assert found is not None
    assert found.acceptance_length == 1 + 5 / 5


def test_a_position_without_a_sample_was_never_reached() -> None:
    gap = VLLM.replace('position="1"', 'position="3"')
    found = parse_counters(gap + OURS, "m").acceptance
    assert found is not None
    assert found.accepted_per_position == (4, 0, 1, 2)
    assert found.drafted_per_position == (6, 5, 0, 0)
    before_any_draft = OURS.splitlines(keepends=True)[0]
    found = parse_counters(VLLM + before_any_draft, "m").acceptance
    assert found is not None
    assert found.drafted_per_position == (0, 0, 0)


def test_a_server_without_speculation_has_the_other_counters() -> None:
    text = "".join(line for line in VLLM.splitlines(keepends=True) if "spec_decode" not in line)
    assert parse_counters(text, "m") == Counters(None, 40, 2, 100, 64)


def test_the_models_that_were_counted_are_told() -> None:
    assert counted_models(VLLM) == ["m", "other"]
    assert counted_models(OURS) == counted_models("# nothing\n") == []


def test_other_text_is_not_taken_for_counters() -> None:
    assert parse_counters("# nothing\n") == Counters()
    with pytest.raises(ValueError):
        parse_counters("<html>not found</html>")
