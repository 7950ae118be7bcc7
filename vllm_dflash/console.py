# SPDX-License-Identifier: Apache-2.0
"""What the commands share: finding the models, running an engine behind a progress display, telling what went wrong."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vllm_dflash.benchmark.engine_process import EngineFailedError, run_engine
from vllm_dflash.benchmark.job import EngineJob, EngineResult, Ready, Response
from vllm_dflash.config import DFlashConfig

#: The pair that a checkout of the repository brings along.
SHIPPED_PAIR = Path(__file__).resolve().parents[1] / "models" / "tiny-python"
LOG_TAIL_LINES = 20
#: Exit status of a command that Ctrl-C ended, as shells give it.
INTERRUPTED = 130


class CommandError(Exception):
    """Something the user can put right. The message is shown as it is, without a traceback."""


@contextlib.contextmanager
def value_errors() -> Iterator[None]:
    """Raise a ValueError of the block as CommandError: its message already names what to change."""
    try:
        yield
    except ValueError as error:
        raise CommandError(str(error)) from error


def require_packages(names: Iterable[str], extra: str) -> None:
    """Raise CommandError naming the packages that are not installed and the extra that brings them.

    names: as they are imported.
    """
    missing = [name.replace("_", "-") for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"{', '.join(missing)} not installed: pip install 'vllm-dflash[{extra}]'")


def require_vllm() -> None:
    """Raise CommandError if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise CommandError("vLLM is not installed: pip install 'vllm-dflash[cpu]' or 'vllm-dflash[cuda]'")


def resolve_pair(target: str | None, drafter: str | None) -> tuple[str, str]:
    """The target and drafter to run: the given ones, or the shipped pair. Raises CommandError if one is missing."""
    if (target is None) != (drafter is None):
        raise CommandError("--target and --drafter go together: a drafter only works with the target it was trained on")
    pair = (target or str(SHIPPED_PAIR / "target"), drafter or str(SHIPPED_PAIR / "drafter"))
    for flag, model in zip(("--target", "--drafter"), pair, strict=True):
        if not Path(model).is_dir() and not looks_like_hub_id(model):
            hint = "" if target else f" The shipped pair comes with the repository's checkout; {flag} names another."
            raise CommandError(f"{flag}: there is no directory {model}.{hint}")
    return pair


def looks_like_hub_id(model: str) -> bool:
    """Whether it is of the form owner/name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) is not None


def resolve_num_speculative_tokens(drafter: str, requested: int | None) -> int:
    """K: the requested one, or as many as one block of the drafter holds. Raises CommandError on a bad config.json."""
    try:
        return requested or DFlashConfig.from_pretrained(drafter).num_speculative_tokens
    except ValueError as error:
        raise CommandError(str(error)) from error


def new_log_directory() -> Path:
    """A fresh directory for the engines' logs. It is kept: the logs are there to be read afterwards."""
    return Path(tempfile.mkdtemp(prefix="vllm-dflash-"))


def run_with_progress(console: Console, job: EngineJob, title: str, log: Path) -> EngineResult:
    """Run a job, showing the seconds of the engine's start and then the prompts. Raises CommandError if it fails."""
    console.print(f"[bold]{title}[/]: starting vLLM, its log is {log}", highlight=False, soft_wrap=True)
    try:
        with _progress(console, title, len(job.prompts)) as progress:
            result = run_engine(job, log, progress.show)
    except EngineFailedError as error:
        show_log_tail(console, error.log)
        raise CommandError(f"{error}. Its whole log: {error.log}") from error
    console.print(
        f"[bold]{title}[/]: engine ready after {result.startup_seconds:.0f} s, "
        f"{result.num_tokens} tokens at {result.tokens_per_second:.1f} tokens/s",
        highlight=False,
        soft_wrap=True,
    )
    return result


class _JobProgress:
    """One line: a spinner while the engine starts, a bar while prompts run."""

    def __init__(self, progress: Progress, title: str, num_prompts: int) -> None:
        self.progress, self.title = progress, title
        self.task = progress.add_task(f"{title}: engine starts", total=num_prompts)

    def show(self, message: Ready | Response) -> None:
        if isinstance(message, Ready):
            self.progress.update(self.task, description=f"{self.title}: generating")
        else:
            self.progress.advance(self.task)


@contextlib.contextmanager
def _progress(console: Console, title: str, num_prompts: int) -> Iterator[_JobProgress]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("prompts"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _JobProgress(progress, title, num_prompts)


def show_log_tail(console: Console, log: Path) -> None:
    """The last lines, and before them the first error: vLLM's parent process reports its child's failure last."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    tail = lines[-LOG_TAIL_LINES:]
    first_error = next((line for line in lines if re.search(r"\b\w+(Error|Exception)\b: ", line)), None)
    if first_error is not None and first_error not in tail:
        tail = [first_error, "...", *tail]
    console.print(f"[red]the end of {log}:[/]", highlight=False, soft_wrap=True)
    console.print(escape("\n".join(tail)), style="dim", highlight=False, soft_wrap=True)
