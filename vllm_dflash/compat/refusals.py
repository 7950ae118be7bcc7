# SPDX-License-Identifier: Apache-2.0
"""Options of vLLM's that its runners cannot honour with this plugin's drafts, refused before anything starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_dflash.options import DFlashOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Raise ValueError naming the flag, its value and the runner."""
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    assert speculative is not None
    runner = "V2" if vllm_config.use_v2_model_runner else "V1"
    for flag, size in (
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size),
        ("--decode-context-parallel-size", parallel.decode_context_parallel_size),
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size),
    ):
        if size > 1:
            raise ValueError(f"vllm_dflash does not draft with {flag} {size} on vLLM's {runner} runner: set it to 1")
    options = DFlashOptions.from_additional_config(vllm_config.additional_config)
    if parallel.data_parallel_size > 1 and options.prefill_schedule_interval not in (None, 1):
        raise ValueError(
            f'--additional-config\'s "dflash": "prefill_schedule_interval" = {options.prefill_schedule_interval!r} '
            f"does not go together with --data-parallel-size {parallel.data_parallel_size}, whose ranks must agree: "
            "take vLLM's own --prefill-schedule-interval"
        )
    if runner == "V1" and speculative.draft_sample_method != "greedy":
        raise ValueError(
            f'--speculative-config\'s "draft_sample_method" = {speculative.draft_sample_method!r} is not supported on '
            'vLLM\'s V1 runner: leave it at "greedy", which is lossless at every temperature'
        )
