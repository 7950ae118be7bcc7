# SPDX-License-Identifier: Apache-2.0
"""Prompts of a given length: held-out ones of a pair, or random ones that may share all but their end."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from vllm_dflash.benchmark.prompts import load_prompts

TAIL = 64  # tokens of a prompt that are its own where the rest is shared


def held_out_prompts(file: Path, context: int, count: int, first: int = 0) -> list[list[int]]:
    """Real prompts of exactly `context` tokens: each ends as its own, and earlier ones of the set stand before it."""
    ids = [list(prompt.token_ids or ()) for prompt in load_prompts(file, sys.maxsize)]
    prompts = []
    for index in range(first, first + count):
        tokens: list[int] = []
        back = 0
        while len(tokens) < context:
            tokens = ids[(index - back) % len(ids)] + tokens
            back += 1
        prompts.append(tokens[-context:])
    return prompts


def random_prompts(vocabulary: int, context: int, count: int, seed: int, shared: bool) -> list[list[int]]:
    """Random ids without the ends of the vocabulary, where special tokens are."""
    low, high = min(1000, vocabulary // 4), vocabulary - min(1000, vocabulary // 4)
    rng, shared_rng = random.Random(seed), random.Random(context)
    prefix = [shared_rng.randrange(low, high) for _ in range(context - TAIL)] if shared else []
    return [prefix + [rng.randrange(low, high) for _ in range(context - len(prefix))] for _ in range(count)]
