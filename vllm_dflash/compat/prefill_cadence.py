# SPDX-License-Identifier: Apache-2.0
"""When prompts are admitted: where reading one makes a step dear, several at once.

Patch: `Scheduler.schedule`. Reason: vLLM admits prompts at intervals for data parallelism alone
(`--prefill-schedule-interval`). Added: for engines of ours that ask for it, as `"tree": "auto"` does, prompts wait in
the steps that `PrefillCadence` names, by vLLM's own argument. vLLM lets none wait where nothing runs, or where more
requests wait than can be admitted. Removable when vLLM chooses its interval itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
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
    from vllm.v1.request import Request

#: Of a scheduler; absent: not asked yet.
_STATE = "vllm_dflash_prefill_cadence"


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
        interval_before = cadence.interval
        waits = cadence.defers(time.perf_counter()) and may_wait(self.running)
        output = plan(self, throttle_prefills or waits)
        if interval_before == 1 < cadence.interval:
            _tell(cadence)
        if output.total_num_scheduled_tokens:
            read, begun = prompts(output), [new.req_id for new in output.scheduled_new_reqs]
            new_prompts = sum(name in read for name in begun)
            cadence.note(sum(read.values()), new_prompts, len(begun), len(output.num_scheduled_tokens))
        else:
            cadence.idle()
        return output

    patching.replace(scheduler.Scheduler, "schedule", schedule)


def prefill_cadence(scheduler: Any) -> PrefillCadence | None:
    """Of one of vLLM's schedulers; None: vLLM admits prompts."""
    cadence: PrefillCadence | None = getattr(scheduler, _STATE, None)
    return cadence


def interval_in_force(scheduler: Any) -> int | None:
    """The interval, in steps, at which a scheduler admits prompts; None: vLLM admits them."""
    cadence = prefill_cadence(scheduler)
    if cadence is None:
        return None
    return 1 if scheduler.prefill_capacity_bound else cadence.interval


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


def may_wait(running: Sequence[Request]) -> bool:
    """Whether prompts may wait: none has been read in part, and there is something else to do."""
    return not any(request.is_prefill_chunk for request in running) and not all(map(_is_at_its_end, running))


def _is_at_its_end(request: Request) -> bool:
    """Whether what has been scheduled reaches max_tokens, even if all drafts of it are rejected.

    Only then is it known. A request that ends in the step in flight by its text, or by drafts that are accepted, is
    taken to go on: prompts may wait for that step.

    Asynchronous scheduling keeps such a request among those that run until its output is there, and schedules nothing
    for it. Of the step in flight, whose tokens count as computed and as placeholders, it gets one token at least.
    """
    in_flight = request.num_output_placeholders
    at_least = request.num_computed_tokens - in_flight + 2
    return in_flight > 0 and at_least >= request.num_prompt_tokens + request.max_tokens


def prompts(output: SchedulerOutput) -> dict[str, int]:
    """Tokens of those requests of a step that do more than verify their drafts."""
    drafts = output.scheduled_spec_decode_tokens
    numbers = output.num_scheduled_tokens.items()
    return {name: number for name, number in numbers if number > 1 + len(drafts.get(name, ()))}


def _tell(cadence: PrefillCadence) -> None:
    """Once an engine, and then where it is looked for."""
    assert cadence.model is not None
    tell = logger.debug if cadence.is_told else logger.info
    cadence.is_told = True
    tell(
        "vllm_dflash: prompts are admitted every %d steps: reading any makes a step of %.1f ms %.1f ms longer "
        '("prefill_schedule_interval": 1 leaves this to vLLM)',
        cadence.interval, cadence.model.step_ms, cadence.model.reading_ms,
    )  # fmt: skip
