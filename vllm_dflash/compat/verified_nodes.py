# SPDX-License-Identifier: Apache-2.0
"""Draft trees that follow the load, in vLLM's own counters.

The scheduler counts the draft tokens that it planned, also where the runner verified fewer of them, so that
`vllm:spec_decode_num_draft_tokens` would tell nothing of the budget in force. The runner's output says how many were
verified (`metrics/runners.py`), and the others count as what vLLM calls invalid (`metrics/scheduler.py`).
"""

from __future__ import annotations

from typing import Any

from vllm_dflash.budget import even_shares


def count_verified(scheduler_output: Any, num_nodes: int) -> None:
    """Say in vLLM's plan of a step how many of its tokens were none."""
    planned = {name: len(tokens) for name, tokens in scheduler_output.scheduled_spec_decode_tokens.items()}
    if sum(planned.values()) != num_nodes:
        scheduler_output.num_invalid_spec_tokens = not_verified(planned, num_nodes)


def not_verified(planned: dict[str, int], num_verified: int) -> dict[str, int]:
    """Planned tokens of each request that were not verified. Whose they are only the device knows; their sum is right.

    Example: of 4, 2 and 2 planned ones 4 were verified: 2, 1 and 1 were not.
    """
    shares = even_shares(list(planned.values()), num_verified)
    return {name: count - share for (name, count), share in zip(planned.items(), shares, strict=True)}
