# SPDX-License-Identifier: Apache-2.0
"""Draft trees that follow the load, in vLLM's own counters.

Patches: `Scheduler.update_from_output`, and `GPUModelRunner.sample_tokens` of the V2 runner. Reason: the scheduler
counts the draft tokens that it planned, also where the runner verified fewer of them, so that
`vllm:spec_decode_num_draft_tokens` told nothing of the budget in force. Added: the runner's output says how many were
verified, and the others count as what vLLM calls invalid. Removable when vLLM's adaptive verification counts what it
verifies.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from vllm_dflash.budget import even_shares
from vllm_dflash.compat import patching

#: Of a runner's output, which travels between processes with all its attributes.
_VERIFIED = "vllm_dflash_verified_nodes"


def install_runner(model_runner: ModuleType) -> None:
    """Patch `vllm.v1.worker.gpu.model_runner`."""
    patching.replace(model_runner.GPUModelRunner, "sample_tokens", sample_tokens)


def install_scheduler(scheduler: ModuleType) -> None:
    """Patch `vllm.v1.core.sched.scheduler`."""
    patching.replace(scheduler.Scheduler, "update_from_output", update_from_output)


def sample_tokens(self: Any, grammar_output: Any) -> Any:
    """vLLM's method, and how many nodes the step verified. Same signature."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    output = patching.original(GPUModelRunner, "sample_tokens")(self, grammar_output)
    num_nodes = getattr(self.adaptive_verification, "num_verified", None)
    if output is not None and num_nodes is not None:
        setattr(getattr(output, "model_runner_output", output), _VERIFIED, num_nodes)
    return output


def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
    """vLLM's method, told how many of the planned tokens were none. Same signature."""
    from vllm.v1.core.sched.scheduler import Scheduler

    num_nodes = getattr(model_runner_output, _VERIFIED, None)
    if num_nodes is not None:
        planned = {name: len(tokens) for name, tokens in scheduler_output.scheduled_spec_decode_tokens.items()}
        if sum(planned.values()) != num_nodes:
            scheduler_output.num_invalid_spec_tokens = not_verified(planned, num_nodes)
    return patching.original(Scheduler, "update_from_output")(self, scheduler_output, model_runner_output)


def not_verified(planned: dict[str, int], num_verified: int) -> dict[str, int]:
    """Planned tokens of each request that were not verified. Whose they are only the device knows; their sum is right.

    Example: of 4, 2 and 2 planned ones 4 were verified: 2, 1 and 1 were not.
    """
    shares = even_shares(list(planned.values()), num_verified)
    return {name: count - share for (name, count), share in zip(planned.items(), shares, strict=True)}
