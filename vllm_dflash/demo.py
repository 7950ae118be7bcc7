# SPDX-License-Identifier: Apache-2.0
"""`vllm-dflash demo`: the same prompts without and with speculation, one engine after the other, side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rich.console import Console, Group
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from vllm_dflash.benchmark.job import EngineJob, EngineResult, Prompt, Response
from vllm_dflash.benchmark.metrics import AcceptanceCounts, first_difference
from vllm_dflash.benchmark.prompts import load_prompts
from vllm_dflash.console import (
    SHIPPED_PAIR,
    CommandError,
    new_log_directory,
    require_vllm,
    resolve_num_speculative_tokens,
    resolve_pair,
    run_with_progress,
)

PROMPT_LINES_SHOWN = 6
BAR_WIDTH = 20


@dataclass(frozen=True)
class DemoOptions:
    """The command's options. None means the shipped pair, or as many draft tokens as the drafter's block holds."""

    target: str | None = None
    drafter: str | None = None
    num_prompts: int = 4
    max_tokens: int = 128
    num_speculative_tokens: int | None = None
    dtype: str = "float32"


def run_demo(options: DemoOptions, console: Console) -> bool:
    """Run both engines and show the comparison. Returns whether their token ids are identical."""
    require_vllm()
    target, drafter = resolve_pair(options.target, options.drafter)
    speculating = EngineJob(
        target=target,
        prompts=_prompts(options),
        drafter=drafter,
        num_speculative_tokens=resolve_num_speculative_tokens(drafter, options.num_speculative_tokens),
        dtype=options.dtype,
        max_tokens=options.max_tokens,
        warm_up=True,
    )
    logs = new_log_directory()
    plain_job = replace(speculating, drafter=None, num_speculative_tokens=None)
    plain = run_with_progress(console, plain_job, "no speculation", logs / "no-speculation.log")
    dflash = run_with_progress(console, speculating, "DFlash", logs / "dflash.log")

    for before, after in zip(plain.responses, dflash.responses, strict=True):
        console.print(response_panel(before, after))
    console.print(comparison_table(plain, dflash, speculating))
    if options.target is None:
        console.print(
            "The shipped target is tiny and repeats itself, which is easy to draft. Its drafter's card tells apart the "
            f"acceptance inside and outside of repetition: {SHIPPED_PAIR / 'drafter' / 'README.md'}",
            style="dim",
            soft_wrap=True,
        )
    return _num_identical(plain, dflash) == len(plain.responses)


def _prompts(options: DemoOptions) -> tuple[Prompt, ...]:
    path = SHIPPED_PAIR / "heldout.jsonl"
    if not path.is_file():
        raise CommandError(f"the demo's prompts are missing: there is no file {path}. They come with the repository.")
    try:
        return load_prompts(path, options.num_prompts, with_token_ids=options.target is None)
    except ValueError as error:
        raise CommandError(str(error)) from error


def response_panel(plain: Response, dflash: Response) -> Panel:
    """The end of a prompt, what DFlash generated for it, and whether that is what the target alone generates."""
    shown = plain.prompt.text.splitlines()[-PROMPT_LINES_SHOWN:]
    return Panel(
        Group(
            Text("\n".join(shown), style="dim"),
            Syntax(dflash.text, "python", theme="ansi_dark", word_wrap=True, background_color="default"),
        ),
        title=Text(plain.prompt.name),
        subtitle=_difference(plain, dflash),
    )


def _difference(plain: Response, dflash: Response) -> Text:
    index = first_difference(plain.token_ids, dflash.token_ids)
    if index is None:
        return Text(f"{len(plain.token_ids)} tokens, identical to no speculation", style="green")
    return Text(f"differs from no speculation at output token {index}", style="bold red")


def _num_identical(plain: EngineResult, dflash: EngineResult) -> int:
    return sum(a.token_ids == b.token_ids for a, b in zip(plain.responses, dflash.responses, strict=True))


def comparison_table(plain: EngineResult, dflash: EngineResult, job: EngineJob) -> Table:
    """The one table that the demo is about. `job` is the speculating one: what the numbers were measured with."""
    count, identical = len(plain.responses), _num_identical(plain, dflash)
    table = Table(
        title=f"{count} prompts, {plain.num_tokens} output tokens, greedy, one request at a time",
        title_justify="left",
        caption=f"{job.num_speculative_tokens} draft tokens a step, dtype {job.dtype}, warmed up, prefill included",
        caption_justify="left",
    )
    table.add_column("")
    table.add_column("no speculation", justify="right")
    table.add_column("DFlash", justify="left")
    speed_up = dflash.tokens_per_second / plain.tokens_per_second if plain.tokens_per_second else 0.0
    table.add_row("output tokens/s", f"{plain.tokens_per_second:.1f}", f"{dflash.tokens_per_second:.1f}")
    table.add_row("speed-up", "1.00 x", f"{speed_up:.2f} x")
    for label, value in acceptance_rows(dflash.acceptance):
        table.add_row(label, "-", value)
    table.add_row(
        "token ids identical",
        "-",
        Text(f"{identical} of {count} prompts", style="green" if identical == count else "bold red"),
    )
    return table


def acceptance_rows(counts: AcceptanceCounts | None) -> list[tuple[str, str]]:
    """Label and value of each acceptance figure; the last value holds one line for each position."""
    if counts is None or counts.acceptance_length is None or counts.acceptance_rate is None:
        return [("acceptance", "nothing was drafted")]
    return [
        ("mean acceptance length", f"{counts.acceptance_length:.2f} (bonus token included)"),
        ("acceptance rate", f"{counts.acceptance_rate:.1%} of {counts.drafted_tokens} tokens"),
        ("acceptance per position", "\n".join(_bar(i, rate) for i, rate in enumerate(counts.position_rates, start=1))),
    ]


def _bar(position: int, rate: float) -> str:
    return f"{position:>2} {'█' * round(rate * BAR_WIDTH):<{BAR_WIDTH}} {rate:>4.0%}"
