# SPDX-License-Identifier: Apache-2.0
"""The options of `vllm-dflash bench` as the command line has them. Imports what it needs when it runs."""

from __future__ import annotations

import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_dflash.cli_types import Dtype


class Backend(str, Enum):
    VLLM = "vllm"
    SGLANG = "sglang"
    OFFLINE = "offline"
    TRANSFORMERS = "transformers"


class Api(str, Enum):
    OPENAI = "openai"
    GENERATE = "generate"


class System(str, Enum):
    PLAIN = "plain"
    VLLM = "vllm"
    VLLM_DFLASH = "vllm_dflash"


def _option(help: str, *names: str, metavar: str | None = None, min: float | None = None, panel: str = "") -> object:
    return typer.Option(*names, help=help, metavar=metavar, min=min, rich_help_panel=panel or None)


SERVER, ENGINE, OUTPUT = "A running server (vllm, sglang)", "An engine of its own (offline, transformers)", "Results"


def bench(
    backend: Annotated[Backend, _option("A running server, or an engine that is started here.")] = Backend.VLLM,
    dataset: Annotated[
        list[str] | None,
        _option(
            "mini (shipped), gsm8k, math500, aime24, aime25, humaneval, mbpp, livecodebench, swe-bench, mt-bench, "
            "alpaca (from the hub), or a JSONL file with turns, messages, prompt or text. Repeatable. Default: mini.",
            metavar="NAME|FILE",
        ),
    ] = None,
    dataset_revision: Annotated[
        list[str] | None,
        _option("Commit or tag of a hub's data set. Default: the commit that is pinned here.", metavar="NAME=COMMIT"),
    ] = None,
    concurrency: Annotated[str, _option("Requests in flight, one run for each.", metavar="N,N,...")] = "1",
    num_prompts: Annotated[int | None, _option("So many of each set, drawn by the seed. Default: all.", min=1)] = None,
    max_tokens: Annotated[int, _option("Output tokens of each request, at most.", min=1)] = 512,
    temperature: Annotated[float, _option("0 is greedy.", min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="1 leaves nothing out.")] = 1.0,
    thinking: Annotated[
        bool | None,
        _option(
            "Given to the chat template as enable_thinking. Default: the template's own.", "--thinking/--no-thinking"
        ),
    ] = None,
    chat: Annotated[bool, _option("Through the chat template, or as it is.", "--chat/--raw")] = True,
    warm_up: Annotated[int, _option("Prompts before each run that are not measured.", min=0)] = 1,
    seed: Annotated[int, _option("Of the choice of prompts, and of sampling.")] = 0,
    timeout: Annotated[float, _option("Seconds a request may take.", min=0.001)] = 600.0,
    base_url: Annotated[
        str | None,
        _option("The server. Default: port 8000 (vllm) or 30000 (sglang) here.", metavar="URL", panel=SERVER),
    ] = None,
    metrics_url: Annotated[
        str | None, _option("Its counters. Default: BASE_URL/metrics.", metavar="URL", panel=SERVER)
    ] = None,
    baseline_url: Annotated[
        str | None, _option("A second server to compare with, run by run in turn.", metavar="URL", panel=SERVER)
    ] = None,
    model: Annotated[str | None, _option("Its name there. Default: the first one listed.", panel=SERVER)] = None,
    api: Annotated[Api, _option("OpenAI's API, or SGLang's /generate.", panel=SERVER)] = Api.OPENAI,
    tokenizer: Annotated[
        str | None, _option("For --api generate --chat: whose template. Default: the model.", panel=SERVER)
    ] = None,
    target: Annotated[str | None, _option("Default: the shipped one.", metavar="DIR", panel=ENGINE)] = None,
    drafter: Annotated[str | None, _option("Default: the shipped one.", metavar="DIR", panel=ENGINE)] = None,
    num_speculative_tokens: Annotated[
        int | None,
        _option("Draft tokens a step. Default: the block's.", "-k", "--num-speculative-tokens", min=1, panel=ENGINE),
    ] = None,
    dtype: Annotated[Dtype, _option("What the engine computes in.", panel=ENGINE)] = Dtype.AUTO,
    system: Annotated[
        list[System] | None,
        _option("Of --backend offline: plain, vLLM's own dflash, vllm_dflash. Default: all.", panel=ENGINE),
    ] = None,
    engine_args: Annotated[
        str | None,
        _option("Of --backend offline: more arguments of vLLM's LLM(...).", metavar="JSON", panel=ENGINE),
    ] = None,
    baseline: Annotated[
        Path | None, _option("An earlier --output to compare with.", metavar="JSON", panel=OUTPUT)
    ] = None,
    output: Annotated[Path | None, _option("All records and measures.", metavar="JSON", panel=OUTPUT)] = None,
    report: Annotated[Path | None, _option("One self-contained page.", metavar="HTML", panel=OUTPUT)] = None,
    saved: Annotated[
        list[Path] | None,
        _option("Measure nothing: show an earlier --output. More than once.", "--from", metavar="JSON", panel=OUTPUT),
    ] = None,
) -> None:
    """Measure speed and acceptance on prompt sets: tokens/s, TTFT, TPOT, acceptance, speed-up over a baseline.

    Ctrl-C ends it and keeps what there is. Exits with 1 if a run had no completed request.
    """
    from rich.console import Console

    from vllm_dflash.bench import render_saved, run_bench
    from vllm_dflash.bench_backends import BenchOptions
    from vllm_dflash.bench_outputs import Outputs
    from vllm_dflash.benchmark.offline_runs import SYSTEMS

    console, outputs = Console(), Outputs(output, report)
    if saved:
        render_saved(saved, baseline, outputs, console)
        return
    options = BenchOptions(
        backend=backend.value,
        datasets=tuple(dict.fromkeys(dataset or ["mini"])),
        revisions=dict(_pair(text) for text in dataset_revision or ()),
        concurrencies=_numbers(concurrency),
        num_prompts=num_prompts,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        thinking=thinking,
        chat=chat,
        warm_up=warm_up,
        seed=seed,
        timeout_seconds=timeout,
        base_url=base_url,
        metrics_url=metrics_url,
        baseline_url=baseline_url,
        baseline=baseline,
        model=model,
        api=api.value,
        tokenizer=tokenizer,
        target=target,
        drafter=drafter,
        num_speculative_tokens=num_speculative_tokens,
        dtype=dtype.value,
        systems=tuple(dict.fromkeys(one.value for one in system)) if system else tuple(SYSTEMS),
        engine_args=_object(engine_args),
    )
    status = run_bench(options, outputs, shlex.join(["vllm-dflash", *sys.argv[1:]]), console)
    if status:
        raise typer.Exit(status)


def _pair(text: str) -> tuple[str, str]:
    from vllm_dflash.console import CommandError

    name, equals, revision = text.partition("=")
    if not (name and equals and revision):
        raise CommandError(f"--dataset-revision {text}: NAME=COMMIT is needed, such as gsm8k=main")
    return name, revision


def _object(text: str | None) -> dict[str, Any]:
    import json

    from vllm_dflash.console import CommandError

    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise CommandError(f"--engine-args {text}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CommandError(f'--engine-args {text}: a JSON object is needed, such as {{"max_model_len": 4096}}')
    return found


def _numbers(text: str) -> tuple[int, ...]:
    from vllm_dflash.console import CommandError

    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 1:
        raise CommandError(f"--concurrency {text}: whole numbers from 1 on are needed, with commas between: 1,8,32")
    return numbers
