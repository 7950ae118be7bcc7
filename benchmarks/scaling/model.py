# SPDX-License-Identifier: Apache-2.0
"""Milliseconds of a decode step of a dense decoder on 1 to 8 GPUs, from sizes: no measurement, a handful of constants.

A step multiplies its rows with all weights once, reads the cached K/V of every request, streams the rows' activations
and, with tensor parallelism, sums them up twice a layer. Matrix products take as long as reading their weights or as
computing, whichever is longer.

A row is one token of one request in one forward. Letters: R requests, K draft tokens, T ranks of tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_BYTES = 2  # of a value in bf16
#: Near the knee, reading weights and computing do not overlap wholly: the 4th root of the sum of their 4th powers.
_KNEE = 4


@dataclass(frozen=True)
class Card:
    """A GPU and what joins it to others of its host."""

    name: str
    weights_tb_s: float  # reached by matrix products of few rows
    stream_tb_s: float  # reached by a copy
    tflop_s: float  # bf16, reached by large products at the card's power limit
    layer_us: float  # of a layer, beside its products: launches in a graph, what is too small to fill the card
    passes: float  # how often a layer reads or writes a row's hidden state
    sum_us: float  # of a small all-reduce
    link_gb_s: float  # of a large one, to and from each GPU
    host_ms: float  # that vLLM works for a step on the host: no step takes less


#: Fitted to the measured steps of one GPU (results/decode_steps_h200.csv). What all-reduces take was assumed before
#: two GPUs were measured (steps modelled with it are within 9 % of those): small ones about 10 us over NVLink, large
#: ones as long as at some three quarters of its 450 GB/s in each direction.
H200 = Card("H200", 3.56, 4.25, 640.0, 24.0, 24.0, 10.0, 350.0, 2.9)


@dataclass(frozen=True)
class Shape:
    """What counts of a dense decoder's configuration."""

    layers: int
    hidden: int
    layer_weights: int  # values in a layer's matrices
    head_weights: int  # values in the LM head
    kv_values: int  # that a layer caches for a token

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Of a Hugging Face configuration. Raises KeyError naming what it does not say, ValueError for experts."""
        experts = next(
            (key for key in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(key)), None
        )
        if experts:
            raise ValueError(f"{experts} = {config[experts]}: this is the arithmetic of dense models")
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        kv = (config.get("num_key_value_heads") or heads) * head_dim
        attention = 2 * hidden * heads * head_dim + 2 * hidden * kv
        layer = attention + 3 * hidden * config["intermediate_size"]
        return cls(config["num_hidden_layers"], hidden, layer, hidden * config["vocab_size"], 2 * kv)


def step_ms(
    card: Card,
    target: Shape,
    drafter: Shape,
    num_reqs: int,  # R, of one engine
    context: float,  # tokens of a request, on average
    draft_tokens: int,  # K; 0: no speculation
    ranks: int = 1,  # T
) -> float:
    """One step: verifying K drafts and a token of each request, and drafting the next K, all dealt out to the ranks."""
    rows = num_reqs * (1 + draft_tokens)
    verifying = _layers_ms(card, target, num_reqs, rows, context, ranks) + _head_ms(card, target, rows, ranks)
    return max(verifying + draft_ms(card, drafter, num_reqs, context, draft_tokens, ranks), card.host_ms)


def draft_ms(
    card: Card,
    drafter: Shape,
    num_reqs: int,  # R
    context: float,
    draft_tokens: int,  # K
    ranks: int = 1,  # T
    is_whole: bool = False,  # all layers on every rank; the head, which is the target's, is dealt out
) -> float:
    """The drafting of a step; 0 without speculation."""
    if not draft_tokens:
        return 0.0
    layers = _layers_ms(card, drafter, num_reqs, num_reqs * (1 + draft_tokens), context, 1 if is_whole else ranks)
    return layers + _head_ms(card, drafter, num_reqs * draft_tokens, ranks)


def _layers_ms(card: Card, shape: Shape, num_reqs: int, rows: int, context: float, ranks: int) -> float:
    products = _products_ms(card, shape.layers * shape.layer_weights, rows) / ranks
    cached = num_reqs * context * shape.layers * shape.kv_values * _BYTES / ranks
    # Norms and residuals stand on every rank, what lies between a layer's products is dealt out.
    streamed = rows * shape.layers * shape.hidden * card.passes * _BYTES * (1 + 1 / ranks) / 2
    reading = 1e3 * (cached + streamed) / (1e12 * card.stream_tb_s)
    return products + reading + 1e-3 * shape.layers * card.layer_us + _sums_ms(card, shape, rows, ranks)


def _head_ms(card: Card, shape: Shape, rows: int, ranks: int) -> float:
    return _products_ms(card, shape.head_weights, rows) / ranks


def _products_ms(card: Card, weights: float, rows: int) -> float:
    reading = 1e3 * weights * _BYTES / (1e12 * card.weights_tb_s)
    computing = 1e3 * 2 * weights * rows / (1e12 * card.tflop_s)
    return float((reading**_KNEE + computing**_KNEE) ** (1 / _KNEE))


def _sums_ms(card: Card, shape: Shape, rows: int, ranks: int) -> float:
    """Two all-reduces a layer; each moves 2 (T-1)/T of the rows' hidden states."""
    if ranks == 1:
        return 0.0
    moved = 2 * (ranks - 1) / ranks * rows * shape.hidden * _BYTES
    return 2 * shape.layers * (1e-3 * card.sum_us + 1e3 * moved / (1e9 * card.link_gb_s))


def acceptance_rate(acceptance_length: float, draft_tokens: int) -> float:
    """The chance of one more draft to be accepted, were it the same everywhere, from 1 + p + p^2 + ... + p^K."""
    if not 1.0 <= acceptance_length <= 1 + draft_tokens:
        raise ValueError(f"acceptance length {acceptance_length:g} of {draft_tokens} draft tokens")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens_of_step(middle, draft_tokens) < acceptance_length else (low, middle)
    return (low + high) / 2


def tokens_of_step(rate: float, draft_tokens: int) -> float:
    """Acceptance length where each draft is accepted with this chance, if those before it were."""
    return sum(rate**position for position in range(draft_tokens + 1))
