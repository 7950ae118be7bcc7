# SPDX-License-Identifier: Apache-2.0
"""`vllm-dflash generate`: one engine with speculation. Text goes to stdout, everything about it to stderr."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_dflash.benchmark.job import EngineJob, Prompt
from vllm_dflash.console import (
    new_log_directory,
    require_vllm,
    resolve_num_speculative_tokens,
    resolve_pair,
    run_with_progress,
)
from vllm_dflash.demo import acceptance_rows


@dataclass(frozen=True)
class GenerateOptions:
    """The command's options. chat None: use the target's chat template if it has one."""

    prompts: tuple[str, ...]
    target: str | None = None
    drafter: str | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    chat: bool | None = None
    num_speculative_tokens: int | None = None
    dtype: str = "auto"


def run_generate(options: GenerateOptions, out: Console, err: Console) -> None:
    """Generate for each prompt and show what the drafter contributed."""
    require_vllm()
    target, drafter = resolve_pair(options.target, options.drafter)
    job = EngineJob(
        target=target,
        prompts=tuple(Prompt(text, text) for text in options.prompts),
        drafter=drafter,
        num_speculative_tokens=resolve_num_speculative_tokens(drafter, options.num_speculative_tokens),
        dtype=options.dtype,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        chat=options.chat,
    )
    result = run_with_progress(err, job, "DFlash", new_log_directory() / "dflash.log")
    for response in result.responses:
        if len(result.responses) > 1:
            err.rule(Text(response.prompt.name.splitlines()[0]), align="left")
        out.print(response.text, markup=False, highlight=False, soft_wrap=True)
    table = Table(show_header=False, title_justify="left")
    for label, value in acceptance_rows(result.acceptance):
        table.add_row(label, value)
    err.print(table)
