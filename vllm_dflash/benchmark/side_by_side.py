# SPDX-License-Identifier: Apache-2.0
"""Results beside others: over an earlier baseline, or several files in one table. What differs between them is told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from vllm_dflash.benchmark.records import Run
from vllm_dflash.benchmark.results import Results

#: These do not change what is measured.
HARMLESS = ("warm_up", "timeout_seconds")
#: Nor do these, of a baseline that drafts nothing.
OF_DRAFTS = ("drafter", "num_speculative_tokens")
#: Settings that a server, or an older file, does not tell: None is no difference.
OFTEN_UNKNOWN = ("model", "drafter", "num_speculative_tokens", "dtype", "api")
#: Of the environment, what makes speeds another's.
MACHINE = ("CPU", "GPU", "vllm_dflash", "vllm", "torch", "transformers")


def with_baseline(results: Results, other: Results, path: str) -> Results:
    """`results` with speed-ups over another run's results. Raises ValueError if those hold several systems."""
    systems = sorted({run.system for run in other.runs})
    name = other.baseline if other.baseline in systems else systems[0] if len(systems) == 1 else None
    if name is None:
        raise ValueError(f"--baseline {path}: holds runs of {', '.join(systems) or 'nothing'}: one system is needed")
    label = f"{name} ({path})"
    runs = tuple(replace(run, system=label) for run in other.runs if run.system == name)
    drafts = any(run.counters is not None and run.counters.acceptance is not None for run in runs)
    ignored = HARMLESS if drafts else HARMLESS + OF_DRAFTS
    return replace(
        results,
        baseline=label,
        baseline_runs=runs,
        notes=(*results.notes, *_differences(results, other, path, "The baseline", ignored)),
    )


def merged_results(loaded: Sequence[tuple[Results, str]]) -> Results:
    """Several results as one, the first one's settings leading. Speed-ups stay those over each file's own baseline.

    Systems whose runs an earlier file has too get their file's name. Raises ValueError if a file is there twice.
    """
    paths = [path for _, path in loaded]
    (first, _), *_ = loaded
    if len(loaded) == 1:
        return first
    _check_distinct(paths)
    taken: set[tuple[str, str, int]] = set()
    runs: list[Run] = []
    notes = [note for results, _ in loaded for note in results.notes]
    for (results, path), label in zip(loaded, distinct_names(paths), strict=True):
        clashing = {run.system for run in results.runs if _key(run) in taken}
        taken |= {_key(run) for run in results.runs}
        for run, speed in zip(results.runs, results.reference_speeds, strict=True):
            system = f"{run.system} ({label})" if run.system in clashing else run.system
            runs.append(replace(run, system=system, reference_tokens_per_second=speed))
        notes += _differences(first, results, path, "The run")
    baselines = [f"of {path} over {results.baseline}" for results, path in loaded if results.baseline]
    if baselines:
        notes.append(f"Speed-ups are over each file's own baseline: those {', '.join(baselines)}.")
    prompt_sets = {info.name: info for results, _ in reversed(loaded) for info in results.prompt_sets}
    return replace(
        first,
        runs=tuple(runs),
        notes=tuple(dict.fromkeys(notes)),
        prompt_sets=tuple(reversed(prompt_sets.values())),
        baseline=None,
        baseline_runs=(),
    )


def _key(run: Run) -> tuple[str, str, int]:
    return run.system, run.dataset, run.concurrency


def _check_distinct(paths: Sequence[str]) -> None:
    seen: dict[Path, str] = {}
    for path in paths:
        file = Path(path).resolve()
        if file in seen:
            raise ValueError(f"--from {seen[file]} --from {path}: the same file twice")
        seen[file] = path


def distinct_names(paths: Sequence[str]) -> list[str]:
    """The files' names without suffix, with as many folders before them as it takes to tell them apart."""
    parts = [Path(path).with_suffix("").parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)  # they differ in their suffix alone


def _differences(
    results: Results, other: Results, path: str, who: str, ignored: Sequence[str] = HARMLESS
) -> Iterable[str]:
    """What makes a comparison unfair, one sentence each."""
    theirs = asdict(other.settings)
    for key, value in asdict(results.settings).items():
        unknown = key in OFTEN_UNKNOWN and None in (value, theirs[key])
        if key not in ignored and not unknown and theirs[key] != value:
            yield f"{who} in {path} used {key} = {theirs[key]}, these runs used {value}."
    for key in MACHINE:
        there, here = other.environment.get(key, "none"), results.environment.get(key, "none")
        if there != here:
            yield f"{who} in {path} was measured with {key}: {there}, these runs with {here}."
    revisions = {info.name: (info.revision, info.prompts) for info in other.prompt_sets}
    for info in results.prompt_sets:
        if info.name in revisions and revisions[info.name] != (info.revision, info.prompts):
            yield f"{who} in {path} used other prompts of {info.name}."
