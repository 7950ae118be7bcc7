# SPDX-License-Identifier: Apache-2.0
"""Which prompts are kept out of the training: the same ones whatever their order, by a hash of their tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

Prompts = Mapping[str, Sequence[int]]


def split(prompts: Prompts, num_held_out: int, most: int | None) -> tuple[Prompts, Prompts]:
    """Training prompts, at most so many, and held-out ones. Equal prompts are one: none is on both sides.

    Raises ValueError where too few are left to train on.
    """
    different = {tuple(ids): key for key, ids in prompts.items()}
    ordered = sorted(different.items(), key=lambda item: hashlib.sha256(json.dumps(item[0]).encode()).hexdigest())
    if len(ordered) <= num_held_out:
        raise ValueError(
            f"{len(ordered)} different prompts, of which data.held_out = {num_held_out} are kept for the evaluation, "
            "leave none to train on: give more prompts, or hold fewer out"
        )
    held_out = {key for _, key in ordered[:num_held_out]}
    kept = set(different.values()) - held_out
    training = {key: ids for key, ids in prompts.items() if key in kept}
    chosen = dict(list(training.items())[:most])
    return chosen, {key: ids for key, ids in prompts.items() if key in held_out}
