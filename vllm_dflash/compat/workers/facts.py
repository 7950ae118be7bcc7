# SPDX-License-Identifier: Apache-2.0
"""What a process has of this plugin, and what is wrong with that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vllm_dflash.compat.version import DISTRIBUTIONS, SUPPORTED, SWITCH, is_supported

#: This plugin's name among vLLM's general plugins, and vLLM's environment variable that chooses among these.
ENTRY_POINT, CHOICE = "dflash", "VLLM_PLUGINS"


class ProcessFacts(NamedTuple):
    """Of one process: a worker's, or the engine core's."""

    host: str
    rank: int | None  # of a worker
    package: str | None  # version of vllm_dflash; None: it cannot be imported
    problem: str  # why not
    is_registered: bool
    vllm: str | None
    switch: str | None  # values of environment variables
    choice: str | None


def make_probe() -> Callable[[Any], dict[str, Any]]:
    """A function of a worker (or None) that finds a process's facts. It may run where this package is not installed."""
    names, distributions = (SWITCH, CHOICE), DISTRIBUTIONS

    # cloudpickle sends a nested function by value, so this one must bring all it needs along.
    def probe(worker: Any) -> dict[str, Any]:
        import os
        import socket
        import sys
        from importlib.metadata import PackageNotFoundError, version

        package, problem, vllm = None, "", None
        try:
            import vllm_dflash

            package = vllm_dflash.__version__
        except Exception as error:  # a broken installation may raise anything, and all of it is told
            problem = f"{type(error).__name__}: {error}"
        for name in distributions:
            try:
                vllm = vllm or version(name)
            except PackageNotFoundError:
                continue
        return {
            "host": socket.gethostname(),
            "rank": getattr(worker, "rank", None),
            "package": package,
            "problem": problem,
            "is_registered": getattr(sys.modules.get("vllm_dflash.compat.install"), "_installed", False),
            "vllm": vllm,
            "switch": os.environ.get(names[0]),
            "choice": os.environ.get(names[1]),
        }

    return probe


def check_all(processes: Sequence[ProcessFacts], wanted: str) -> None:
    """Raise RuntimeError naming every process that lacks version `wanted` of this plugin, and what to do there."""
    faults = [(facts, fault(facts, wanted)) for facts in processes]
    lines = [f"{_name(facts)}: {found}" for facts, found in faults if found]
    if lines:
        raise RuntimeError(complaint(*lines))


def complaint(*lines: str) -> str:
    """The error that a user sees: what is wrong, one line a process."""
    told = "\n".join(f"  {line}" for line in lines)
    return (
        f"vllm_dflash: this engine drafts with vllm_dflash, and not all of its processes have it:\n{told}\n"
        "An engine's processes need the same vllm-dflash, vLLM and switches in all of its environments "
        "(docs/scaling.md)."
    )


def fault(facts: ProcessFacts, wanted: str) -> str | None:
    """What is wrong with a process and what to do about it; None: nothing."""
    if facts.package is None:
        return f"vllm_dflash cannot be imported ({facts.problem}); {install_advice(wanted)}"
    if facts.package != wanted:
        return f"vllm-dflash is {facts.package} there, the engine's configuration is by {wanted}; install the same"
    if facts.is_registered:
        return None
    if facts.switch == "0":
        return f"switched off there by {SWITCH}=0; unset it, or set it for the whole engine"
    if not is_supported(facts.vllm):
        return f"vLLM is {facts.vllm} there, and vllm-dflash {wanted} is for {SUPPORTED}.x; install one of these"
    if facts.choice is not None and ENTRY_POINT not in facts.choice.split(","):
        return f'left out there by {CHOICE}={facts.choice!r}; add "{ENTRY_POINT}" to it, or set it for the whole engine'
    return (
        f"vLLM has not loaded its entry point there (vllm.general_plugins: {ENTRY_POINT}); {install_advice(wanted)}, "
        "not by copying its folder. If it is installed, that process's log says why it did not load"
    )


def install_advice(wanted: str) -> str:
    """How to install it."""
    return f"install it in that environment with pip (pip install vllm-dflash=={wanted})"


def _name(facts: ProcessFacts) -> str:
    return f"{'engine core' if facts.rank is None else f'rank {facts.rank}'} on host {facts.host}"
