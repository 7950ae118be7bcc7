# SPDX-License-Identifier: Apache-2.0
"""The command `vllm-dflash`. Each command imports what it needs when it runs, so that --help is instant."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from vllm_dflash import __version__
from vllm_dflash.bench_command import bench
from vllm_dflash.cli_types import Dtype

app = typer.Typer(
    help="DFlash speculative decoding for vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


class EngineDtype(str, Enum):
    """vLLM's --dtype."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Target = Annotated[
    str | None, typer.Option(metavar="DIR", help="Target model, a directory or hub id. Default: the shipped one.")
]
Drafter = Annotated[
    str | None, typer.Option(metavar="DIR", help="Its drafter, a directory or hub id. Default: the shipped one.")
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Output tokens of each prompt, at most.")]
NumSpeculativeTokens = Annotated[
    int | None,
    typer.Option(
        "-k",
        "--num-speculative-tokens",
        min=1,
        help="Draft tokens a step. Default: as many as the drafter's block holds.",
    ),
]


@contextlib.contextmanager
def _plain_errors(exit_code: int = 1) -> Iterator[None]:
    """Show what the user can put right as one message instead of a traceback."""
    from vllm_dflash.console import CommandError

    try:
        yield
    except CommandError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(exit_code) from None


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    target: Target = None,
    drafter: Drafter = None,
    max_tokens: MaxTokens = 128,
    num_prompts: Annotated[int, typer.Option(min=1, help="How many of the shipped held-out prompts to run.")] = 4,
    num_speculative_tokens: NumSpeculativeTokens = None,
    dtype: Annotated[
        Dtype,
        typer.Option(help="In less than float32, rounding can flip a near-tie between two tokens: output may differ."),
    ] = Dtype.FLOAT32,
) -> None:
    """Generate the same prompts without and with DFlash and compare speed and output.

    Exits with 1 if the token ids differ.
    """
    with _plain_errors():
        from rich.console import Console

        from vllm_dflash.demo import DemoOptions, run_demo

        options = DemoOptions(target, drafter, num_prompts, max_tokens, num_speculative_tokens, dtype.value)
        identical = run_demo(options, Console())
    if not identical:
        raise typer.Exit(1)


@app.command()
def doctor(
    target: Target = None,
    drafter: Annotated[
        str | None,
        typer.Option(
            "--draft",
            "--drafter",
            metavar="DIR",
            help="Its drafter, a directory or hub id. Default: the shipped one.",
        ),
    ] = None,
    run: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Also run N prompts and measure the acceptance.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSONL of prompts (id, text) for --run. Default: shipped ones.")
    ] = None,
    max_tokens: MaxTokens = 128,
    num_speculative_tokens: NumSpeculativeTokens = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="As for vLLM: tokens of the longest request.")
    ] = None,
    dtype: Annotated[EngineDtype, typer.Option(help="As for vLLM: what is computed in.")] = EngineDtype.AUTO,
    kv_cache_dtype: Annotated[str, typer.Option(help="As for vLLM: what the KV cache holds.")] = "auto",
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="As for vLLM: GPUs that share the models.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="A report for scripts on stdout.")] = False,
) -> None:
    """Check from their files, in seconds and without a GPU, whether a target and a drafter go together.

    Exits with 0 if there is nothing to put right, 1 with warnings, 2 with errors.
    """
    with _plain_errors(exit_code=2):
        from rich.console import Console

        from vllm_dflash.compat.model_support import engine_facts
        from vllm_dflash.doctor.command import DoctorOptions, run_doctor
        from vllm_dflash.doctor.facts import Asked

        asked = Asked(num_speculative_tokens, max_model_len, dtype.value, kv_cache_dtype, tensor_parallel_size)
        options = DoctorOptions(target, drafter, asked, run, prompts, max_tokens, json)
        code = run_doctor(options, engine_facts, Console(), Console(stderr=True))
    raise typer.Exit(code)


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="The prompts, one argument each.")],
    target: Target = None,
    drafter: Drafter = None,
    max_tokens: MaxTokens = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="Through the target's chat template or as it is. Default: if it has one."),
    ] = None,
    num_speculative_tokens: NumSpeculativeTokens = None,
    dtype: Annotated[Dtype, typer.Option(help="What the engine computes in.")] = Dtype.AUTO,
) -> None:
    """Generate text with DFlash; the text goes to stdout, progress and acceptance to stderr."""
    with _plain_errors():
        from rich.console import Console

        from vllm_dflash.generate import GenerateOptions, run_generate

        options = GenerateOptions(
            tuple(prompts), target, drafter, max_tokens, temperature, chat, num_speculative_tokens, dtype.value
        )
        run_generate(options, Console(), Console(stderr=True))


@app.command()
def train(
    target: Annotated[str, typer.Option(metavar="DIR", help="The model to draft for, a directory or hub id.")],
    prompts: Annotated[
        list[str],
        typer.Option(
            metavar="FILE",
            help="JSONL (messages, conversations, prompt, text), .txt, hub:NAME[@REVISION][:SPLIT]; more than once.",
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The drafter's folder. An unfinished run goes on.")],
    config: Annotated[Path | None, typer.Option(metavar="YAML", help="The recipe. Default: the paper's.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One setting over the recipe: training.steps=2000."),
    ] = None,
    init_from: Annotated[
        str | None, typer.Option(metavar="DIR", help="Go on training this drafter instead of a new one.")
    ] = None,
    only_data: Annotated[
        bool, typer.Option(help="Stop when responses (and cached features) are there: before `accelerate launch`.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Write an untrained drafter and serve it, to see that all fits.")
    ] = False,
) -> None:
    """Train a drafter for any target: the target answers prompts, and the drafter learns to foresee it."""
    with _plain_errors():
        from rich.console import Console

        from vllm_dflash.train import run_train

        run_train(target, prompts, output, config, settings or [], init_from, only_data, dry_run, Console())


@app.command()
def collect(
    logs: Annotated[list[Path], typer.Argument(metavar="LOG...", help="JSONL of OpenAI-style requests.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="JSONL of prompts for `train`.")],
    max_prompts: Annotated[int | None, typer.Option(min=1, help="So many, at most.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output if it exists.")] = False,
) -> None:
    """Turn the prompts of a request log into training prompts, so that a drafter can follow your traffic."""
    with _plain_errors():
        from rich.console import Console

        from vllm_dflash.train import run_collect

        run_collect(logs, output, max_prompts, overwrite, Console())


@app.command()
def top(
    url: Annotated[str, typer.Argument(metavar="URL", help="A running `vllm serve`: http://localhost:8000.")],
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds from one look to the next.")] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one screen, of two looks an interval apart, and end.")
    ] = False,
) -> None:
    """Watch a running server: throughput, acceptance by position, trees, caches, fall-backs. Ctrl-C ends it."""
    with _plain_errors():
        from rich.console import Console

        from vllm_dflash.top.command import run_top

        run_top(url, interval, once, Console())


app.command()(_plain_errors()(bench))


def main() -> None:
    """Entry point of the script `vllm-dflash`."""
    app()
