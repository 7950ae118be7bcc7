# SPDX-License-Identifier: Apache-2.0
"""`vllm-dflash train` and `vllm-dflash collect`: what the command line gives to the training, and what it shows."""

from __future__ import annotations

import gc
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler

from vllm_dflash.benchmark.job import EngineJob, Prompt
from vllm_dflash.config import DFlashConfig
from vllm_dflash.console import (
    new_log_directory,
    require_packages,
    run_with_progress,
    value_errors,
)

_PROOF_TOKENS = 16


def run_train(
    target: str,
    prompts: Sequence[str],
    output: Path,
    config: Path | None,
    settings: Sequence[str],
    init_from: str | None,
    only_data: bool,
    dry_run: bool,
    console: Console,
) -> None:
    """Raises CommandError for what the user can put right."""
    require_packages(("accelerate", "pydantic", "tensorboard", "torch", "yaml"), "train")
    _log_to(console)
    with value_errors():
        from transformers.utils.logging import disable_progress_bar

        from vllm_dflash.training.command import DrafterRun, TrainOptions, dry_run_folder
        from vllm_dflash.training.recipe import read_recipe

        disable_progress_bar()
        recipe = read_recipe(config, overrides(settings))
        options = TrainOptions(target, tuple(prompts), output, recipe, init_from, dry_run, only_data)
        found = DrafterRun(options).run()
    if dry_run:
        _serve(target, dry_run_folder(output), console)
    elif found is not None:
        console.print(f"acceptance length [bold]{found.length:.2f}[/] on held-out prompts; the drafter: {output}")


def run_collect(logs: Sequence[Path], output: Path, max_prompts: int | None, overwrite: bool, console: Console) -> None:
    """Raises CommandError for what the user can put right."""
    with value_errors():
        from vllm_dflash.training.request_log import collect

        report = collect(logs, output, max_prompts=max_prompts, overwrite=overwrite)
    console.print(f"{report.written} prompts written to {output}, {report.duplicates} duplicates left out")
    if report.first_malformed is not None:
        console.print(f"the first line that is not JSON: {report.first_malformed}")
    for reason, count in report.skipped.items():
        console.print(f"{count} lines left out: {reason}")


def overrides(settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By section and key: of ["training.steps=20"], {"training": {"steps": 20}}. Raises ValueError for another form."""
    import yaml

    found: dict[str, dict[str, Any]] = {}
    for setting in settings:
        path, equals, value = setting.partition("=")
        section, dot, key = path.partition(".")
        if not (equals and dot and section and key):
            raise ValueError(f"--set {setting}: SECTION.KEY=VALUE is needed, such as training.steps=2000")
        try:
            found.setdefault(section, {})[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {setting}: what is behind the = is not YAML; quote it: {error}") from error
    return found


def _serve(target: str, drafter: Path, console: Console) -> None:
    """The proof of a dry run: vLLM loads the pair and answers."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()  # the target's memory, which vLLM wants
    if importlib.util.find_spec("vllm") is None:
        console.print(f"an untrained drafter: {drafter} (vLLM is not installed, so it was not served)")
        return
    job = EngineJob(
        target,
        (Prompt("proof", "def", None),),
        drafter=str(drafter),
        num_speculative_tokens=DFlashConfig.from_pretrained(str(drafter)).num_speculative_tokens,
        max_tokens=_PROOF_TOKENS,
    )
    run_with_progress(console, job, "the untrained drafter", new_log_directory() / "dflash.log")
    console.print(f"it serves: {drafter}")


def _log_to(console: Console) -> None:
    handler = RichHandler(console=console, show_path=False, show_level=False, log_time_format="%H:%M:%S")
    logger = logging.getLogger("vllm_dflash")
    logger.setLevel(logging.INFO)
    logger.handlers = [handler]
    logger.propagate = False
