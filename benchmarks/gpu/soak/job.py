# SPDX-License-Identifier: Apache-2.0
"""What the two children get: arguments of `LLM(...)`, the load, and their environment."""

from __future__ import annotations

import argparse
import os
import sys

from gpu.engine_process import environment
from gpu.machine import on_cuda
from gpu.names import OURS, Record
from gpu.pair import kv_token_bytes, read_pair
from vllm_dflash.benchmark.prompts import load_prompts

REFERENCE_BATCH = 96


def engine_job(name: str, args: argparse.Namespace) -> Record:
    target, drafter = read_pair(args.pair)
    longest = max_model_len(args, target)
    arguments: Record = {
        "model": target["path"],
        "skip_tokenizer_init": True,
        "dtype": args.dtype,
        "max_model_len": longest,
        "max_num_seqs": args.concurrency if name == OURS else REFERENCE_BATCH,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "enable_prefix_caching": args.prefix_caching and name == OURS,
        "disable_log_stats": False,
    }
    tokens = max(args.kv_tokens or 512 * args.concurrency, 2 * longest)
    if on_cuda():
        room = tokens if name == OURS else REFERENCE_BATCH * longest
        pool = room * kv_token_bytes((target, drafter), args.dtype) + 2**28
        arguments |= {"gpu_memory_utilization": 0.25, "kv_cache_memory_bytes": pool}
    if args.attention_backend:
        arguments["attention_backend"] = args.attention_backend
    if name == OURS:
        arguments |= {"num_gpu_blocks_override": tokens // args.block_size, "block_size": args.block_size}
        arguments["speculative_config"] = speculation(args, drafter)
        arguments["additional_config"] = args.additional_config
    job: Record = {"llm": arguments | args.engine_args}
    return job | ({"load": load_settings(args, target)} if name == OURS else {})


def max_model_len(args: argparse.Namespace, target: Record) -> int:
    k = args.k or 15
    return min(target["max_position_embeddings"], args.longest_prompt + args.longest_output + k + 1)


def speculation(args: argparse.Namespace, drafter: Record) -> Record:
    config: Record = {"method": "dflash", "model": drafter["path"]}
    return config | ({"num_speculative_tokens": args.k} if args.k else {})


def load_settings(args: argparse.Namespace, target: Record) -> Record:
    """What the load is made of: text to cut prompts from, and how much of everything."""
    ends = target.get("eos_token_id")
    prompts = load_prompts(args.pair / "heldout.jsonl", sys.maxsize)
    return {
        "tokens": [token for prompt in prompts for token in prompt.token_ids or ()],
        "end_ids": [ends] if isinstance(ends, int) else ends or [],
        "longest_prompt": min(args.longest_prompt, max_model_len(args, target) - 2),
        "longest_output": args.longest_output,
        "concurrency": args.concurrency,
        "aborted_share": args.aborted_share,
        "sampled_share": args.sampled_share,
        "warm_up_seconds": args.warm_up_seconds,
        "seconds": 60 * args.minutes,
        "most_unchecked": 4 * REFERENCE_BATCH,
        "seed": args.seed,
    }


def engine_environment(name: str, args: argparse.Namespace) -> dict[str, str]:
    settings = environment(name)
    if args.dtype == "float32":  # Triton's own default rounds the operands of fp32 products to TF32
        settings.setdefault("TRITON_F32_DEFAULT", "ieee")
    elif on_cuda():
        settings.setdefault("VLLM_BATCH_INVARIANT", "1")
    if not on_cuda():  # threads of two engines on one core wait for each other most of the time
        cores = sorted(os.sched_getaffinity(0))
        settings.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(cores[0 if name == OURS else -1]))
    return settings
