# SPDX-License-Identifier: Apache-2.0
"""What a child gets: arguments of `LLM(...)`, and how to fill weights."""

from __future__ import annotations

from gpu.decode.workload import Workload
from gpu.machine import on_cuda
from gpu.names import NONE, OURS, Record
from gpu.pair import kv_token_bytes


def engine_job(name: str, workload: Workload) -> Record:
    args = workload.args
    arguments: Record = {
        "model": workload.target["path"],
        "skip_tokenizer_init": True,
        "dtype": args.dtype or ("auto" if args.pair else "bfloat16"),
        "max_model_len": workload.max_model_len,
        "max_num_seqs": workload.most_requests,
        "max_num_batched_tokens": 8192,
        "enable_prefix_caching": True,
        "disable_log_stats": not args.real,
    }
    if args.pair is None:
        arguments["load_format"] = "dummy"
    if on_cuda():
        arguments |= {"gpu_memory_utilization": 0.25, "kv_cache_memory_bytes": kv_bytes(name, workload)}
    if args.capture_all and name != OURS:
        arguments["compilation_config"] = {"cudagraph_capture_sizes": capture_sizes(name, workload)}
    if name != NONE:
        arguments["speculative_config"] = speculation(workload)
    if name == OURS and args.additional_config:
        arguments["additional_config"] = args.additional_config
    return {"llm": arguments | args.engine_args, "seed": 1}


def speculation(workload: Workload) -> Record:
    args = workload.args
    config: Record = {"method": "dflash", "model": workload.drafter["path"], "num_speculative_tokens": workload.k}
    if not args.real:
        config |= {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": args.acceptance}
    return config


def kv_bytes(name: str, workload: Workload) -> int:
    """Room for the largest point, so that no engine ever preempts."""
    models = [workload.target] if name == NONE else [workload.target, workload.drafter]
    return int(1.05 * kv_token_bytes(models, workload.args.dtype) * workload.most_tokens) + 2**28


def capture_sizes(name: str, workload: Workload) -> list[int]:
    """vLLM's default steps, and exactly the rows that every measured number of requests needs."""
    rows = 1 if name == NONE else workload.k + 1
    return sorted({1, 2, 4, *range(8, 256, 8), *range(256, 513, 16), *(n * rows for n in workload.args.requests)})
