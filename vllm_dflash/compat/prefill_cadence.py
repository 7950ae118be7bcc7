# SPDX-License-Identifier: Apache-2.0
"""When prompts are let in: where reading one makes a step dear, several at once.

Patch: `Scheduler.schedule`. Reason: vLLM lets prompts in at every so many steps for data parallelism alone
(`--prefill-schedule-interval`). Added: for engines of ours that ask for it, as `"tree": "auto"` does, prompts wait on
the steps that `PrefillCadence` names, by vLLM's own argument. vLLM lets none wait where nothing decodes, or where more
requests wait than can be taken in. Removable when vLLM chooses its interval itself.
"""

from __future__ import annotations

import time
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_dflash.cadence import PrefillCadence
from vllm_dflash.compat import patching
from vllm_dflash.compat.ownership import draft_tree, drafts_here
from vllm_dflash.logs import logger
from vllm_dflash.options import AUTO, DFlashOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

#: Of a scheduler; absent: not asked yet.
_STATE = "vllm_dflash_prefill_cadence"
_TOLD = "vllm_dflash_prefill_cadence_told"


def install(scheduler: ModuleType) -> None:
    """Patch `vllm.v1.core.sched.scheduler`."""
    plan = scheduler.Scheduler.schedule

    def schedule(self: Any, throttle_prefills: bool = False) -> SchedulerOutput:
        """vLLM's method. Same signature."""
        if _STATE not in self.__dict__:
            setattr(self, _STATE, cadence_of(self.vllm_config))
        cadence = prefill_cadence(self)
        if cadence is None:
            return plan(self, throttle_prefills)
        if not self.running:  # since then nobody may have asked for anything
            cadence.pause()
        is_first = cadence.interval == 1
        # A prompt that has been begun is read to its end at once.
        waits = cadence.defers(time.perf_counter()) and not any(request.is_prefill_chunk for request in self.running)
        output = plan(self, throttle_prefills or waits)
        if is_first and cadence.interval > 1:
            _tell(self, cadence)
        if output.total_num_scheduled_tokens:
            cadence.note(prompt_tokens(output), len(output.scheduled_new_reqs), len(output.num_scheduled_tokens))
        else:  # nothing to do, for as long as it takes
            cadence.pause()
        return output

    patching.replace(scheduler.Scheduler, "schedule", schedule)


def prefill_cadence(scheduler: Any) -> PrefillCadence | None:
    """Of one of vLLM's schedulers; None: prompts are let in as vLLM does it."""
    cadence: PrefillCadence | None = getattr(scheduler, _STATE, None)
    return cadence


def cadence_of(vllm_config: VllmConfig) -> PrefillCadence | None:
    """What an engine asks for. Data parallel ranks must agree, so vLLM paces those."""
    if not drafts_here(vllm_config) or vllm_config.parallel_config.data_parallel_size > 1:
        return None
    interval = DFlashOptions.from_additional_config(vllm_config.additional_config).prefill_schedule_interval
    if interval is None:
        shape = draft_tree(vllm_config)
        interval = AUTO if shape is not None and shape.is_auto else 1
    if interval == AUTO:
        return PrefillCadence()
    return PrefillCadence(int(interval)) if interval != 1 else None


def prompt_tokens(output: SchedulerOutput) -> int:
    """Of a step: tokens of requests that do more than verify their drafts."""
    drafts = output.scheduled_spec_decode_tokens
    return sum(number for name, number in output.num_scheduled_tokens.items() if number > 1 + len(drafts.get(name, ())))


def _tell(scheduler: Any, cadence: PrefillCadence) -> None:
    """Once an engine, and then where it is looked for."""
    assert cadence.model is not None
    tell = logger.debug if scheduler.__dict__.setdefault(_TOLD, False) else logger.info
    setattr(scheduler, _TOLD, True)
    tell(
        "vllm_dflash: prompts are let in every %d steps: reading any makes a step of %.1f ms %.1f ms longer "
        '("prefill_schedule_interval": 1 leaves this to vLLM)',
        cadence.interval, cadence.model.step_ms, cadence.model.reading_ms,
    )  # fmt: skip
