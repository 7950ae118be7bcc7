# SPDX-License-Identifier: Apache-2.0
"""`"tree": "auto"` also says when prompts are let in: where reading one makes a step dear, several at once.

Patch: `Scheduler.schedule`. Reason: vLLM lets prompts in at every so many steps for data parallelism alone
(`prefill_schedule_interval`). Added: for engines of ours whose budget follows the load, prompts wait on the steps that
`PrefillCadence` names, by vLLM's own argument. vLLM lets none wait where nothing decodes, or where more requests wait
than can be taken in. Removable when vLLM chooses its interval itself.
"""

from __future__ import annotations

import time
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_dflash.cadence import PrefillCadence
from vllm_dflash.compat import patching
from vllm_dflash.compat.ownership import draft_tree, drafts_here
from vllm_dflash.logs import logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

#: Of a scheduler; absent: not asked yet.
_STATE = "vllm_dflash_prefill_cadence"


def install(scheduler: ModuleType) -> None:
    """Patch `vllm.v1.core.sched.scheduler`."""
    plan = scheduler.Scheduler.schedule

    def schedule(self: Any, throttle_prefills: bool = False) -> SchedulerOutput:
        """vLLM's method. Same signature."""
        if _STATE not in self.__dict__:
            setattr(self, _STATE, PrefillCadence() if follows_load(self.vllm_config) else None)
        cadence: PrefillCadence | None = getattr(self, _STATE)
        if cadence is None:
            return plan(self, throttle_prefills)
        before = cadence.interval
        output = plan(self, throttle_prefills or cadence.defers(time.perf_counter()))
        if cadence.interval != before:
            logger.debug("vllm_dflash: prompts are let in at every %d. step", cadence.interval)
        if output.total_num_scheduled_tokens:
            cadence.note(prompt_tokens(output), len(output.scheduled_new_reqs), len(output.num_scheduled_tokens))
        else:
            cadence.pause()
        return output

    patching.replace(scheduler.Scheduler, "schedule", schedule)


def follows_load(vllm_config: VllmConfig) -> bool:
    """Whether an engine is one whose prompts may wait. Ranks that must agree are vLLM's to pace."""
    if not drafts_here(vllm_config) or vllm_config.parallel_config.data_parallel_size > 1:
        return False
    shape = draft_tree(vllm_config)
    return shape is not None and shape.is_auto


def prompt_tokens(output: SchedulerOutput) -> int:
    """Of a step: tokens of requests that do more than verify their drafts."""
    drafts = output.scheduled_spec_decode_tokens
    return sum(number for name, number in output.num_scheduled_tokens.items() if number > 1 + len(drafts.get(name, ())))
