# SPDX-License-Identifier: Apache-2.0
"""What is said of a run's size."""

from __future__ import annotations

from tests.unit.bench.samples import record
from vllm_dflash.benchmark.notes import with_notes
from vllm_dflash.benchmark.records import Run


def test_prompts_of_the_same_name_are_several() -> None:
    """Three conversations, two of one name; one has a second turn."""
    requests = (record(0), record(0), record(1), record(1, turn=2))
    assert with_notes(Run("s", "own", 3, 4.0, requests)).notes == ()
    (note,) = with_notes(Run("s", "own", 4, 4.0, requests)).notes
    assert note == "s, own at concurrency 4: 3 prompts cannot keep 4 requests in flight."
