# SPDX-License-Identifier: Apache-2.0
"""A report on its way from the scheduler's process to those that serve /metrics.

vLLM sends its statistics as declared dataclasses, so that one attribute more would be lost. `num_draft_tokens_per_pos`
of its SpecDecodingStats is a list of integers that nothing of vLLM's reads: a report stands behind its positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from vllm_dflash.compat.metrics.fallbacks import Fallback
from vllm_dflash.compat.metrics.report import BudgetInForce, StepReport, StepTimes

_ABSENT = -1
_REASONS = list(Fallback)


def encode(report: StepReport) -> list[int]:
    """As integers: times, budget, prompts' interval, and how often each fall-back, in the order in which they are
    defined."""
    times, budget = report.times or (_ABSENT, _ABSENT), report.budget or (_ABSENT, _ABSENT)
    interval = report.prefill_schedule_interval or _ABSENT
    return [*times, *budget, interval, *(report.fallbacks[reason] for reason in _REASONS)]


def decode(numbers: Sequence[int]) -> StepReport | None:
    """The report that these are; None where there are none."""
    if not numbers:
        return None
    verify_us, draft_us, num_nodes, num_reqs, interval, *counts = numbers
    return StepReport(
        times=None if verify_us == _ABSENT else StepTimes(verify_us, draft_us),
        budget=None if num_nodes == _ABSENT else BudgetInForce(num_nodes, num_reqs),
        fallbacks=Counter({reason: n for reason, n in zip(_REASONS, counts, strict=True) if n}),
        prefill_schedule_interval=None if interval == _ABSENT else interval,
    )
