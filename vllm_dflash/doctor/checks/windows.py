# SPDX-License-Identifier: Apache-2.0
"""Sliding windows, and what they do to prefix caching."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_dflash.config import SLIDING_ATTENTION
from vllm_dflash.doctor.facts import Facts
from vllm_dflash.doctor.finding import Finding, info, ok, warning

_KEYS = ("layer_types", "sliding_window", "use_sliding_window")
_WATCH = "watch vllm:prefix_cache_hits with and without the drafter on prompts that share a prefix"


def check_windows(facts: Facts) -> Iterator[Finding]:
    """Whether the keys about windows agree. A layer trained with a window and run without drafts badly."""
    id, config, flat = "sliding-window", facts.drafter.config, facts.drafter.flat
    if config is None or not facts.drafter.can_read(*_KEYS):
        return
    windows = [layer.sliding_window for layer in config.layers]
    sliding = [window for window in windows if window is not None]
    if not sliding and flat.get("use_sliding_window") and flat.get("sliding_window"):
        yield warning(
            id,
            f"use_sliding_window = true with sliding_window = {flat['sliding_window']}, but no layer of layer_types is "
            f"{SLIDING_ATTENTION!r}: all layers see everything",
            f"name the sliding layers {SLIDING_ATTENTION!r} in layer_types, or set use_sliding_window to false",
        )
    elif not sliding:
        yield ok(id, f"none: all {len(windows)} layers see the whole context")
    elif len(sliding) == len(windows):
        yield ok(id, f"all {len(windows)} layers see {sliding[0]} tokens back")
    else:
        yield ok(id, f"{len(sliding)} of {len(windows)} layers see {sliding[0]} tokens back, the others everything")


def check_prefix_cache(facts: Facts) -> Iterator[Finding]:
    """Whether the pair's caches still let requests share prefixes."""
    id, config = "prefix-cache", facts.drafter.config
    if config is None or not facts.drafter.can_read(*_KEYS):
        return
    kinds = facts.target.text.get("layer_types")
    is_recurrent = isinstance(kinds, list) and any("linear" in str(kind) or "mamba" in str(kind) for kind in kinds)
    sliding = [layer for layer in config.layers if layer.sliding_window is not None]
    if sliding:
        yield info(
            id,
            f"{len(sliding)} of {len(config.layers)} draft layers slide: users of vLLM report hit rates down to 0 "
            "with such drafters",
            f"{_WATCH}; where hits vanish, --disable-hybrid-kv-cache-manager has helped",
        )
    elif is_recurrent:
        yield info(id, "the target has recurrent layers, whose prefix caching is limited beside any drafter", _WATCH)
    else:
        yield ok(id, "the draft layers see everything, so prefixes are shared, but for the last block of a hit")
