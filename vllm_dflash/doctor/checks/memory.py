# SPDX-License-Identifier: Apache-2.0
"""What the pair takes of a device's memory: weights by their headers, KV cache by the configs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_dflash.doctor.checks.precision import compute_dtype
from vllm_dflash.doctor.facts import Facts
from vllm_dflash.doctor.finding import Finding, error, info, ok, warning

#: Of a GPU's memory, vLLM's default of --gpu-memory-utilization.
GPU_SHARE = 0.92
_DTYPE_BYTES = {"float32": 4.0, "float64": 8.0}
#: Kinds of layers that keep no keys and values.
_RECURRENT = ("linear", "mamba", "conv", "recurrent")


def check_memory(facts: Facts) -> Iterator[Finding]:
    """Weights and KV bytes of a token, and what a GPU of this machine has room for."""
    id, ranks = "memory", facts.asked.tensor_parallel_size
    target, drafter = facts.target.weights, facts.drafter.weights
    if not target.has_headers or not drafter.has_headers:
        yield info(id, "not estimated: the weights' headers could not be read")
        return
    weights = (target.num_bytes + drafter.num_bytes) / ranks
    per_token = kv_bytes_per_token(facts)
    seen = f"weights {size_text(target.num_bytes)} + {size_text(drafter.num_bytes)} (drafter)"
    if per_token is not None:
        where = " on each rank" if ranks > 1 else ""
        seen += f", KV cache {size_text(per_token[0])} + {size_text(per_token[1])} (drafter) a token{where}"
    if not facts.machine.gpus:
        yield ok(id, f"{seen}; no GPU here")
        return
    name, memory = min(facts.machine.gpus[:ranks], key=lambda gpu: gpu[1])
    room = memory * GPU_SHARE - weights
    on = f"on {ranks} x {name}" if ranks > 1 else f"on {name}"
    if room <= 0:
        yield warning(
            id,
            f"{seen}: more than {size_text(memory * GPU_SHARE)} a GPU {on}",
            "more GPUs (--tensor-parallel-size), or a quantized target",
        )
    elif per_token is None:
        yield ok(id, f"{seen}; {size_text(room)} left for the KV cache {on}")
    else:
        tokens = int(room / sum(per_token))
        yield ok(id, f"{seen}; room for about {tokens:,} tokens of KV cache {on}, activations not counted")


def check_tensor_parallel(facts: Facts) -> Iterator[Finding]:
    """Whether both models' heads can be dealt out over the ranks."""
    ranks = facts.asked.tensor_parallel_size
    if ranks == 1:
        return
    counts = _head_counts(facts)
    odd = [f"{whose} has {heads}" for whose, (heads, _) in counts.items() if heads is not None and heads % ranks]
    odd_kv = [f"{whose} has {heads}" for whose, (_, heads) in counts.items() if heads and not _can_share(heads, ranks)]
    if odd:
        yield error(
            "tensor-parallel",
            f"--tensor-parallel-size {ranks} does not divide the attention heads: {', '.join(odd)}",
            "a size that divides both models' num_attention_heads",
        )
    if odd_kv:
        yield error(
            "tensor-parallel",
            f"--tensor-parallel-size {ranks} neither divides the KV heads nor is a multiple of them: "
            f"{', '.join(odd_kv)}",
            "a size that divides both models' num_key_value_heads, or is a multiple of them",
        )
    if not odd and not odd_kv:
        yield ok("tensor-parallel", f"{ranks} ranks, heads dealt out evenly")
    gpus = len(facts.machine.gpus)
    if 0 < gpus < ranks:
        yield warning("tensor-parallel", f"{ranks} ranks, but {gpus} GPU(s) here", "run it where there are enough")


def _head_counts(facts: Facts) -> dict[str, tuple[int | None, int | None]]:
    """Of each model: attention heads and KV heads; None where it does not tell, or has none (MLA)."""
    target, drafter, config = facts.target, facts.drafter, facts.drafter.config
    heads = target.number("num_attention_heads")
    counts = {"the target": (heads, None if has_latents(target.text) else target.number("num_key_value_heads"))}
    if config is not None and drafter.can_read("num_attention_heads"):
        kv_heads = config.num_key_value_heads if drafter.can_read("num_key_value_heads") else None
        counts["the drafter"] = (config.num_attention_heads, kv_heads)
    return counts


def _can_share(kv_heads: int, ranks: int) -> bool:
    """Whether each rank has as many, or each head is held by as many ranks."""
    return kv_heads % ranks == 0 or ranks % kv_heads == 0


def kv_bytes_per_token(facts: Facts) -> tuple[float, float] | None:
    """Of the target and of the drafter, on each rank; None where the target does not tell its shape.

    Sliding layers are counted like others: they hold less of long requests.
    """
    ranks = facts.asked.tensor_parallel_size
    value_bytes = kv_value_bytes(facts.asked.kv_cache_dtype, compute_dtype(facts))
    values, config = target_kv_values(facts.target.text, ranks), facts.drafter.config
    if values is None or config is None:
        return None
    own = 2 * config.num_hidden_layers * heads_of_a_rank(config.num_key_value_heads, ranks) * config.head_dim
    return values * value_bytes, own * value_bytes


def heads_of_a_rank(kv_heads: int, ranks: int) -> int:
    """Where there are fewer heads than ranks, several ranks hold the same one."""
    return max(1, kv_heads // ranks)


def has_latents(text: Mapping[str, Any]) -> bool:
    """Whether the target's attention caches one latent for all heads (MLA)."""
    return isinstance(text.get("kv_lora_rank"), int)


def target_kv_values(text: Mapping[str, Any], ranks: int = 1) -> int | None:
    """Values that a rank caches for a token: keys and values of its heads of the attention layers, or latents (MLA),
    which every rank holds whole.
    """
    layers, heads = text.get("num_hidden_layers"), text.get("num_attention_heads")
    if not isinstance(layers, int) or not isinstance(heads, int) or not heads:
        return None
    kinds = text.get("layer_types")
    if isinstance(kinds, list):
        layers = sum(not any(part in str(kind) for part in _RECURRENT) for kind in kinds)
    if has_latents(text):
        return layers * (text["kv_lora_rank"] + (text.get("qk_rope_head_dim") or 0))
    head_dim = text.get("head_dim") or (text.get("hidden_size") or 0) // heads
    kv_heads = text.get("num_key_value_heads") or heads
    if not isinstance(head_dim, int) or not isinstance(kv_heads, int):
        return None
    return 2 * layers * heads_of_a_rank(kv_heads, ranks) * head_dim


def kv_value_bytes(kv_cache_dtype: str, dtype: str) -> float:
    """Of one cached value. Scales of quantized caches are not counted."""
    if kv_cache_dtype.startswith(("nvfp4", "int4")):
        return 0.5
    if kv_cache_dtype.startswith(("fp8", "int8")):
        return 1.0
    return _DTYPE_BYTES.get(dtype if kv_cache_dtype == "auto" else kv_cache_dtype, 2.0)


def size_text(num_bytes: float) -> str:
    """Such as "2.4 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError("a unit was found above")
