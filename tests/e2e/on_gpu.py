# SPDX-License-Identifier: Apache-2.0
"""The held-out prompts on the shipped pair in bf16, on GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.e2e.engines import TARGET, Run, held_out_prompts, run_engine
from tests.e2e.oracle import assert_same_but_near_ties

NUM_PROMPTS, MAX_TOKENS = 32, 128
BASE = {
    "model": str(TARGET),
    "dtype": "bfloat16",
    "max_model_len": 1024,
    "max_num_seqs": 40,
    "enforce_eager": False,
    "kv_cache_memory_bytes": 2 << 30,
    "gpu_memory_utilization": 0.2,
}


def generate(
    folder: Path,
    alternates: tuple[int, int] | None = None,
    num_prompts: int = NUM_PROMPTS,
    sampling: dict[str, Any] | None = None,
    **changes: Any,
) -> Run:
    """`changes` of BASE, which is without speculation. `alternates`: so many steps draft trees, then so many do not.

    `sampling`: other parameters than those of temperature 0.
    """
    run = {"name": "run", "prompts": held_out_prompts(num_prompts), "max_tokens": MAX_TOKENS}
    run["sampling"] = [sampling or {}] * num_prompts
    return run_engine(
        folder, BASE | changes, [run], runner="V2 on a GPU", alternates=alternates, RAY_USAGE_STATS_ENABLED="0"
    )["run"]


def assert_same_text(got: Run, expected: Run, most: int) -> None:
    """Of the first NUM_PROMPTS prompts at most `most` texts differ, each first at a near-tie."""
    texts = [run.token_ids[:NUM_PROMPTS] for run in (got, expected)]
    assert_same_but_near_ties(*texts, held_out_prompts(NUM_PROMPTS), most=most)
