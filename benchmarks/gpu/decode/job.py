# SPDX-License-Identifier: Apache-2.0
"""What a child gets: arguments of `LLM(...)`, and how to fill weights."""

from __future__ import annotations

from gpu.decode.workload import Workload
from gpu.machine import on_cuda
from gpu.names import ADAPTIVE, NONE, PACED, TREE, Record, base, is_ours, size
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
    if args.capture_all and not is_ours(name):
        arguments["compilation_config"] = {"cudagraph_capture_sizes": capture_sizes(name, workload)}
    if name != NONE:
        arguments["speculative_config"] = speculation(name, workload)
    if is_ours(name):
        arguments["additional_config"] = options(name, args.additional_config)
    return {"llm": arguments | args.engine_args, "seed": 1}


def speculation(name: str, workload: Workload) -> Record:
    args, number = workload.args, size(name)
    config: Record = {"method": "dflash", "model": workload.drafter["path"]}
    if base(name) != TREE:
        config["num_speculative_tokens"] = int(number) if number else workload.k
    if base(name) == ADAPTIVE:
        config["enable_adaptive_verification"] = True
    if not args.real and base(name) != TREE:  # a tree's way is the target's own
        config |= {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": args.acceptance}
    return config


def options(name: str, additional_config: Record) -> Record:
    """The plugin's, with what the engine's name says."""
    said: Record = {}
    if base(name) == TREE:
        number = str(size(name))
        said = {"tree": int(number) if number.isdigit() else number}
    elif base(name) == PACED:
        said = {"prefill_schedule_interval": "auto"}
    return additional_config | {"dflash": additional_config.get("dflash", {}) | said}


def kv_bytes(name: str, workload: Workload) -> int:
    """Room for the largest point, so that no engine ever preempts."""
    models = [workload.target] if name == NONE else [workload.target, workload.drafter]
    return int(1.05 * kv_token_bytes(models, workload.args.dtype) * workload.most_tokens) + 2**28


def capture_sizes(name: str, workload: Workload) -> list[int]:
    """vLLM's default steps, and exactly the rows that every measured number of requests needs."""
    rows = 1 if name == NONE else workload.k + 1
    return sorted({1, 2, 4, *range(8, 256, 8), *range(256, 513, 16), *(n * rows for n in workload.args.requests)})
