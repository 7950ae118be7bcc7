# SPDX-License-Identifier: Apache-2.0
"""The scheduler's part: what a worker reported joins vLLM's statistics of the step.

Patch: `Scheduler.update_from_output`. Reason: the scheduler counts what it planned, and its statistics have no room for
others'. Added: for engines of ours, draft tokens that were not verified count as none (`../verified_nodes.py`), the
report goes with the statistics (`wire.py`), and the log is warned where drafting does harm (`watch.py`). Removable when
adaptive verification counts what it verifies, and vLLM lets a speculator add to its statistics.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_dflash.compat import patching
from vllm_dflash.compat.metrics import wire
from vllm_dflash.compat.metrics.report import StepReport
from vllm_dflash.compat.metrics.runners import report_of
from vllm_dflash.compat.metrics.watch import AcceptanceWatch, PrefixCacheWatch
from vllm_dflash.compat.ownership import draft_tree
from vllm_dflash.compat.prefill_cadence import interval_in_force
from vllm_dflash.compat.verified_nodes import count_verified
from vllm_dflash.logs import logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.spec_decode.metrics import SpecDecodingStats

#: Of a scheduler: what is kept from step to step.
_STATE = "vllm_dflash_metrics"


def install(scheduler: ModuleType) -> None:
    """Patch `vllm.v1.core.sched.scheduler`."""
    update = scheduler.Scheduler.update_from_output

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        """vLLM's method. Same signature."""
        report = report_of(model_runner_output)
        if report is None:
            return update(self, scheduler_output, model_runner_output)
        if report.budget is not None:
            count_verified(scheduler_output, report.budget.num_nodes)
        if not self.log_stats:
            return update(self, scheduler_output, model_runner_output)
        metrics = self.__dict__.setdefault(_STATE, None) or SchedulerMetrics(self.vllm_config)
        setattr(self, _STATE, metrics)
        metrics.see_prompts(self, scheduler_output)
        report.prefill_schedule_interval = interval_in_force(self)
        outputs = update(self, scheduler_output, model_runner_output)
        stats = next((out.scheduler_stats for out in outputs.values() if out.scheduler_stats is not None), None)
        metrics.add(report, stats)
        return outputs

    patching.replace(scheduler.Scheduler, "update_from_output", update_from_output)


class SchedulerMetrics:
    """Reports that wait for statistics to go with, and what watches over them."""

    def __init__(self, vllm_config: VllmConfig, clock: Callable[[], float] = time.monotonic) -> None:
        shape = draft_tree(vllm_config)
        self._tree_depths = shape.num_depths if shape else None
        self._is_auto = shape is not None and shape.is_auto
        self._waiting = StepReport()
        self._acceptance = AcceptanceWatch(clock)
        self._prefix_cache = PrefixCacheWatch(clock)

    def see_prompts(self, scheduler: Any, scheduler_output: Any) -> None:
        """The step's new requests that looked into the prefix cache, before any of them is over."""
        is_looked_up = scheduler.kv_cache_manager.prefix_cache_lookup_enabled
        for new in scheduler_output.scheduled_new_reqs:
            request = scheduler.requests.get(new.req_id)
            # For the V2 runner preempted ones are new again; vLLM counts their lookups apart.
            if request is not None and request.num_preemptions == 0 and is_looked_up(request):
                self._prefix_cache.see_prompt(request.block_hashes)

    def add(self, report: StepReport, stats: SchedulerStats | None) -> None:
        """One step. A report waits for one in which vLLM counts drafts: it would log empty statistics as such."""
        self._waiting.add(report)
        if stats is None:
            return
        of_cache = stats.prefix_cache_stats
        self._warn(self._prefix_cache.see_lookups(of_cache.requests, of_cache.queries, of_cache.hits))
        drafted = stats.spec_decoding_stats
        if drafted is None or not drafted.num_drafts:
            return
        reached = self._drafts_per_position(drafted)
        # vLLM counts a draft wherever it planned one, also where nothing of it was verified.
        self._warn(self._acceptance.see(reached[0], drafted.num_accepted_tokens, report))
        drafted.num_draft_tokens_per_pos = [*reached, *wire.encode(self._waiting)]
        self._waiting = StepReport()

    def _drafts_per_position(self, drafted: SpecDecodingStats) -> list[int]:
        """Drafts that had a token at each position. A tree's positions are its depths, of which it may reach as many
        as it has nodes; where these are shared out on the device, all of the block's."""
        positions, depths = drafted.num_draft_tokens_per_pos, self._tree_depths
        if depths is None:
            return positions
        reached = (
            [drafted.num_drafts if drafted.num_draft_tokens else 0] * depths if self._is_auto else positions[:depths]
        )
        return reached + [0] * (len(positions) - depths)

    @staticmethod
    def _warn(text: str | None) -> None:
        if text is not None:
            logger.warning("vllm_dflash: %s", text)
