# SPDX-License-Identifier: Apache-2.0
"""Pages of /metrics, written by hand after those of vLLM 0.32."""

from __future__ import annotations

#: Two engines of a server without the plugin, K = 3.
VLLM_ONLY = """\
# HELP process_start_time_seconds Start time of the process since unix epoch in seconds.
# TYPE process_start_time_seconds gauge
process_start_time_seconds 1.7e+09
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
vllm:num_requests_running{engine="1",model_name="tiny"} 4.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="tiny"} 0.0
vllm:num_requests_waiting{engine="1",model_name="tiny"} 2.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="tiny"} 0.5
# HELP vllm:prefix_cache_queries_total Prefix cache queries, in terms of number of queried tokens.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="tiny"} 600.0
vllm:prefix_cache_queries_total{engine="1",model_name="tiny"} 200.0
# HELP vllm:prefix_cache_hits_total Prefix cache hits, in terms of number of cached tokens.
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="tiny"} 160.0
vllm:prefix_cache_hits_total{engine="1",model_name="tiny"} 40.0
# HELP vllm:num_preemptions_total Cumulative number of preemption from the engine.
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="tiny"} 1.0
vllm:num_preemptions_total{engine="1",model_name="tiny"} 0.0
# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="tiny"} 600.0
vllm:prompt_tokens_total{engine="1",model_name="tiny"} 200.0
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="tiny"} 100.0
vllm:generation_tokens_total{engine="1",model_name="tiny"} 50.0
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="tiny"} 30.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="tiny"} 10.0
# HELP vllm:spec_decode_num_draft_tokens_total Number of draft tokens.
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="tiny"} 80.0
vllm:spec_decode_num_draft_tokens_total{engine="1",model_name="tiny"} 20.0
# HELP vllm:spec_decode_num_accepted_tokens_total Number of accepted tokens.
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="tiny"} 40.0
vllm:spec_decode_num_accepted_tokens_total{engine="1",model_name="tiny"} 10.0
# HELP vllm:spec_decode_num_accepted_tokens_per_pos_total Accepted tokens per draft position.
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="tiny",position="0"} 20.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="tiny",position="1"} 15.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="tiny",position="2"} 5.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="tiny",position="0"} 8.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="tiny",position="1"} 1.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="tiny",position="2"} 1.0
"""

#: What the plugin adds; a third of the drafts was too short for the last position.
PLUGIN = """\
# HELP vllm_dflash:spec_decode_num_drafts_total Drafts of which a token was verified.
# TYPE vllm_dflash:spec_decode_num_drafts_total counter
vllm_dflash:spec_decode_num_drafts_total{engine="0",model_name="tiny"} 40.0
# HELP vllm_dflash:spec_decode_num_draft_tokens_per_pos_total Drafts that had a token at the position.
# TYPE vllm_dflash:spec_decode_num_draft_tokens_per_pos_total counter
vllm_dflash:spec_decode_num_draft_tokens_per_pos_total{engine="0",model_name="tiny",position="0"} 40.0
vllm_dflash:spec_decode_num_draft_tokens_per_pos_total{engine="0",model_name="tiny",position="1"} 32.0
vllm_dflash:spec_decode_num_draft_tokens_per_pos_total{engine="0",model_name="tiny",position="2"} 24.0
# HELP vllm_dflash:spec_decode_num_accepted_tokens_per_pos_total Accepted tokens at the position.
# TYPE vllm_dflash:spec_decode_num_accepted_tokens_per_pos_total counter
vllm_dflash:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="tiny",position="0"} 28.0
vllm_dflash:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="tiny",position="1"} 16.0
vllm_dflash:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="tiny",position="2"} 6.0
# HELP vllm_dflash:fallbacks_total Times that less was done than asked for, by reason.
# TYPE vllm_dflash:fallbacks_total counter
vllm_dflash:fallbacks_total{engine="0",model_name="tiny",reason="does_not_pay"} 12.0
vllm_dflash:fallbacks_total{engine="0",model_name="tiny",reason="no_graph"} 0.0
vllm_dflash:fallbacks_total{engine="0",model_name="tiny",reason="of a later version"} 2.0
# HELP vllm_dflash:verify_time_seconds From a verifying step's start to its drafting.
# TYPE vllm_dflash:verify_time_seconds histogram
vllm_dflash:verify_time_seconds_bucket{engine="0",le="0.01",model_name="tiny"} 20.0
vllm_dflash:verify_time_seconds_bucket{engine="0",le="+Inf",model_name="tiny"} 20.0
vllm_dflash:verify_time_seconds_count{engine="0",model_name="tiny"} 20.0
vllm_dflash:verify_time_seconds_sum{engine="0",model_name="tiny"} 0.1
# HELP vllm_dflash:draft_time_seconds Drafting in a verifying step.
# TYPE vllm_dflash:draft_time_seconds histogram
vllm_dflash:draft_time_seconds_bucket{engine="0",le="0.01",model_name="tiny"} 20.0
vllm_dflash:draft_time_seconds_bucket{engine="0",le="+Inf",model_name="tiny"} 20.0
vllm_dflash:draft_time_seconds_count{engine="0",model_name="tiny"} 20.0
vllm_dflash:draft_time_seconds_sum{engine="0",model_name="tiny"} 0.03
# HELP vllm_dflash:prefill_schedule_interval Prompts are admitted every so many steps.
# TYPE vllm_dflash:prefill_schedule_interval gauge
vllm_dflash:prefill_schedule_interval{engine="0",model_name="tiny"} 1.0
vllm_dflash:prefill_schedule_interval{engine="1",model_name="tiny"} 6.0
# HELP vllm_dflash:tree_budget_nodes Nodes that the last step verified, of all requests.
# TYPE vllm_dflash:tree_budget_nodes gauge
vllm_dflash:tree_budget_nodes{engine="0",model_name="tiny"} 42.0
# HELP vllm_dflash:tree_budget_requests Requests of that step.
# TYPE vllm_dflash:tree_budget_requests gauge
vllm_dflash:tree_budget_requests{engine="0",model_name="tiny"} 7.0
"""

#: A Ray node's page: two replicas of one engine each, and one that is gone: of it the counters are left.
RAY = """\
# HELP process_start_time_seconds Start time of the process since unix epoch in seconds.
# TYPE process_start_time_seconds gauge
process_start_time_seconds 1.7e+09
# HELP ray_serve_deployment_replica_starts_total The number of times this replica has been started.
# TYPE ray_serve_deployment_replica_starts_total counter
ray_serve_deployment_replica_starts_total{application="vllm",deployment="VllmServer",replica="aaaaaaaa"} 1.0
# HELP ray_vllm_num_requests_running Number of requests in model execution batches.
# TYPE ray_vllm_num_requests_running gauge
ray_vllm_num_requests_running{ReplicaId="aaaaaaaa",engine="0",model_name="tiny"} 3.0
ray_vllm_num_requests_running{ReplicaId="bbbbbbbb",engine="0",model_name="tiny"} 4.0
# HELP ray_vllm_generation_tokens_total Number of generation tokens processed.
# TYPE ray_vllm_generation_tokens_total counter
ray_vllm_generation_tokens_total{ReplicaId="aaaaaaaa",engine="0",model_name="tiny"} 100.0
ray_vllm_generation_tokens_total{ReplicaId="bbbbbbbb",engine="0",model_name="tiny"} 50.0
ray_vllm_generation_tokens_total{ReplicaId="cccccccc",engine="0",model_name="tiny"} 25.0
# HELP ray_vllm_spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE ray_vllm_spec_decode_num_drafts_total counter
ray_vllm_spec_decode_num_drafts_total{ReplicaId="aaaaaaaa",engine="0",model_name="tiny"} 30.0
ray_vllm_spec_decode_num_drafts_total{ReplicaId="bbbbbbbb",engine="0",model_name="tiny"} 10.0
# HELP ray_vllm_spec_decode_num_accepted_tokens_total Number of accepted tokens.
# TYPE ray_vllm_spec_decode_num_accepted_tokens_total counter
ray_vllm_spec_decode_num_accepted_tokens_total{ReplicaId="aaaaaaaa",engine="0",model_name="tiny"} 20.0
ray_vllm_spec_decode_num_accepted_tokens_total{ReplicaId="bbbbbbbb",engine="0",model_name="tiny"} 5.0
# HELP ray_vllm_dflash_spec_decode_num_drafts_total Drafts of which a token was verified.
# TYPE ray_vllm_dflash_spec_decode_num_drafts_total counter
ray_vllm_dflash_spec_decode_num_drafts_total{ReplicaId="aaaaaaaa",engine="0",model_name="tiny"} 15.0
ray_vllm_dflash_spec_decode_num_drafts_total{ReplicaId="bbbbbbbb",engine="0",model_name="tiny"} 5.0
"""

NOT_VLLM = """\
# HELP go_goroutines Number of goroutines that currently exist.
# TYPE go_goroutines gauge
go_goroutines 8.0
"""


def with_values(page: str, **values: float) -> str:
    """The page with other values of metrics of engine 0, by the part of the name behind the colon."""
    lines = []
    for line in page.splitlines():
        name = line.partition("{")[0].partition(":")[2]
        is_asked = name in values and 'engine="0"' in line
        lines.append(f"{line.rpartition(' ')[0]} {values[name]}" if is_asked else line)
    return "\n".join(lines) + "\n"
