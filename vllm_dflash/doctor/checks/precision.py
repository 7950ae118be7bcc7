# SPDX-License-Identifier: Apache-2.0
"""What is computed in, what is quantized, and what the KV cache holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_dflash.doctor.facts import Facts
from vllm_dflash.doctor.finding import Finding, error, info, ok


def stated_dtype(config: Mapping[str, Any]) -> str | None:
    """What a config.json says its weights are in: `dtype`, or `torch_dtype` in older ones."""
    value = config.get("dtype") or config.get("torch_dtype")
    return str(value).removeprefix("torch.") if value else None


def compute_dtype(facts: Facts) -> str:
    """What vLLM computes in: as asked for, else what the target's config.json says; float32 becomes a 16-bit one."""
    if facts.asked.dtype != "auto":
        return facts.asked.dtype
    stated = stated_dtype(facts.target.text) or stated_dtype(facts.target.raw) or "bfloat16"
    return "bfloat16" if stated == "float32" else stated


def check_dtype(facts: Facts) -> Iterator[Finding]:
    """Whether drafter and engine agree. They may differ: vLLM casts the drafter."""
    own, engine = stated_dtype(facts.drafter.flat) or stated_dtype(facts.drafter.raw), compute_dtype(facts)
    if own is None:
        yield info("dtype", f"the engine computes in {engine}; the drafter's config.json tells no dtype of its own")
    elif own == engine:
        yield ok("dtype", f"{engine}, target and drafter")
    elif engine == "float16":
        yield info(
            "dtype",
            f"the drafter's weights are {own}, the engine computes in float16, whose range is smaller",
            "if drafts are never accepted, try --dtype bfloat16",
        )
    else:
        yield info("dtype", f"the drafter's weights are {own}, the engine computes in {engine}: they are cast")


def _method(config: Mapping[str, Any]) -> str | None:
    quantization = config.get("quantization_config")
    return str(quantization.get("quant_method", "?")) if isinstance(quantization, Mapping) else None


def check_quantization(facts: Facts) -> Iterator[Finding]:
    """Quantized weights on either side."""
    id = "quantization"
    target = _method(facts.target.raw) or _method(facts.target.text)
    drafter = _method(facts.drafter.flat) or _method(facts.drafter.raw)
    if target is not None:
        yield info(
            id,
            f"the target is quantized ({target}): its hidden states are not quite those that the drafter learned from",
            "measure it (--run N), beside the unquantized target if you can: some pairs lose most of their acceptance",
        )
    if drafter is not None:
        yield info(id, f"the drafter is quantized ({drafter}): the names and shapes of its tensors were not checked")
    if target is None and drafter is None:
        yield ok(id, "none")


def check_kv_cache_dtype(facts: Facts) -> Iterator[Finding]:
    """Whether a backend with non-causal attention can read such a cache."""
    id, wanted, backends = "kv-cache-dtype", facts.asked.kv_cache_dtype, facts.engine.kv_cache_dtypes
    if wanted == "auto":
        yield ok(id, f"auto: {compute_dtype(facts)}")
        return
    if not backends:
        yield info(id, f"{wanted}: unknown which attention backends can read it")
        return
    able = sorted(name for name, dtypes in backends.items() if wanted in dtypes)
    if able:
        yield info(
            id,
            f"{wanted}: a draft block's attention is non-causal, and of those backends {', '.join(able)} can read it "
            "(FLASH_ATTN reads FP8 on Hopper and later)",
            "if the engine's own choice fails at the start, name one of these with --attention-backend",
        )
    else:
        known = sorted(set().union(*backends.values()))
        yield error(
            id,
            f"no attention backend for draft blocks (non-causal) reads a KV cache of {wanted}",
            f"--kv-cache-dtype: one of {', '.join(known)}",
        )
