# SPDX-License-Identifier: Apache-2.0
"""What a worker says of one step, and how several steps add up until somebody reads them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm_dflash.compat.metrics.fallbacks import Fallback


class StepTimes(NamedTuple):
    """Microseconds of one verifying step: from its start to the drafting's, and the drafting."""

    verify_us: int
    draft_us: int


class BudgetInForce(NamedTuple):
    """What "tree": "auto" chose for a step."""

    num_nodes: int  # of all requests
    num_reqs: int


@dataclass
class StepReport:
    """One step; travels with the runner's output, by pickle."""

    times: StepTimes | None = None
    budget: BudgetInForce | None = None
    #: acceptance length at which a step with drafts yields as many tokens a second as one without; None: not known
    break_even: float | None = None
    fallbacks: Counter[Fallback] = field(default_factory=Counter)
    #: Prompts are admitted every so many steps; the scheduler's word. None: vLLM paces them
    prefill_schedule_interval: int | None = None

    def add(self, later: StepReport) -> None:
        """What the next step says on top: its numbers instead of ours, its counts and ours together."""
        self.times = later.times or self.times
        self.budget = later.budget or self.budget
        self.break_even = later.break_even or self.break_even
        self.fallbacks += later.fallbacks
        self.prefill_schedule_interval = later.prefill_schedule_interval or self.prefill_schedule_interval
