# SPDX-License-Identifier: Apache-2.0
"""Which of the target's layers the drafter reads. What is out of range is `pair.py`'s matter."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_dflash.config import default_target_layer_ids
from vllm_dflash.doctor.facts import Facts
from vllm_dflash.doctor.finding import Finding, info, ok, warning


def check_target_layers(facts: Facts) -> Iterator[Finding]:
    """Compare with the published formula. Others are right too, but the formula's neighbours are suspicious."""
    config, depth = facts.drafter.config, facts.target.number("num_hidden_layers")
    if config is None or depth is None or not facts.drafter.can_read("target_layer_ids"):
        return
    ids = config.target_layer_ids
    if ids[-1] >= depth:
        return
    id, usual = "target-layers", default_target_layer_ids(depth, len(ids))
    seen = f"reads the outputs of decoder layers {list(ids)} of 0..{depth - 1}"
    if ids == usual:
        yield ok(id, f"{seen}, the published choice")
    elif ids == tuple(i + 1 for i in usual):
        yield warning(
            id,
            f"{seen}: each one above the published choice {list(usual)}",
            "if they were copied from a list that counts the embedding as 0, lower each by one; --run N tells",
        )
    else:
        yield info(id, f"{seen}; the published formula would say {list(usual)}, which is a choice of training")
