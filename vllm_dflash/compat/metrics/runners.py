# SPDX-License-Identifier: Apache-2.0
"""Both model runners, told to time their steps and to say what these did.

Patches: `execute_model` and `sample_tokens` of the V1 and the V2 `GPUModelRunner`. Reason: a speculator sees the end of
a step alone, and the scheduler, another process, sees nothing of it. Added: engines of ours take the time of a step's
start (no synchronisation: `meter.py`), and put a report upon the output, which travels between processes with all its
attributes. Removable when vLLM lets a speculator add to its statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_dflash.compat import patching
from vllm_dflash.compat.metrics.report import StepReport

#: Of a runner's output.
_REPORT = "vllm_dflash_report"


def install_v1(gpu_model_runner: ModuleType) -> None:
    """Patch `vllm.v1.worker.gpu_model_runner`."""
    # Without speculation, and on all pipeline ranks but the last, a runner has no drafter.
    _install(gpu_model_runner.GPUModelRunner, lambda runner: getattr(runner, "drafter", None), "_model_runner_output")


def install_v2(model_runner: ModuleType) -> None:
    """Patch `vllm.v1.worker.gpu.model_runner`."""
    _install(model_runner.GPUModelRunner, lambda runner: runner.speculator, "model_runner_output")


def _install(runner_class: Any, find_adapter: Callable[[Any], Any], async_output: str) -> None:
    execute, sample = runner_class.execute_model, runner_class.sample_tokens

    def execute_model(self: Any, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        """vLLM's method. Same signature."""
        meter = getattr(find_adapter(self), "meter", None)
        if meter is not None and scheduler_output.total_num_scheduled_tokens and not options.get("dummy_run"):
            verifying = scheduler_output.scheduled_spec_decode_tokens
            meter.begin_step(len(verifying) == len(scheduler_output.num_scheduled_tokens))
        return execute(self, scheduler_output, *args, **options)

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        """vLLM's method. Same signature."""
        output = sample(self, grammar_output)
        adapter = find_adapter(self)
        of_step = getattr(output, async_output, output)
        # An output of no request is one object that all such steps share.
        if of_step is not None and of_step.req_ids and getattr(adapter, "meter", None) is not None:
            setattr(of_step, _REPORT, adapter.report())
        return output

    patching.replace(runner_class, "execute_model", execute_model)
    patching.replace(runner_class, "sample_tokens", sample_tokens)


def report_of(model_runner_output: Any) -> StepReport | None:
    """What the worker has said of a step; None: it is not ours."""
    report: StepReport | None = getattr(model_runner_output, _REPORT, None)
    return report
