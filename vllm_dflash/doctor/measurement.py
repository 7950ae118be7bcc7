# SPDX-License-Identifier: Apache-2.0
"""What running a pair gave, and what that says. Torch-free; `measure.py` runs it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vllm_dflash.benchmark.metrics import AcceptanceCounts
from vllm_dflash.doctor.finding import Finding, info, ok, warning

#: Other layers are called better if the same texts take so many times fewer drafts, and that is no accident: their
#: drafts, prompt by prompt, differ by so many standard errors, over at least so many prompts.
RATIO, STANDARD_ERRORS, FEWEST_PROMPTS = 1.03, 2.0, 8
#: Template modes give different texts, which differ by themselves.
MODE_RATIO = 1.25
#: Drafting costs a tenth of a step or more; so few tokens a step do not pay it back.
LOWEST_LENGTH = 1.3
#: How a prompt is put to the target.
DEFAULT, THINKING, NO_THINKING = "default", "thinking", "no thinking"


@dataclass(frozen=True)
class Run:
    """The prompts, run in one way.

    shift: what was added to the drafter's target layer ids. counts: pooled. drafts_by_prompt: how many each took.
    """

    layer_ids: tuple[int, ...]
    shift: int
    mode: str
    counts: AcceptanceCounts
    drafts_by_prompt: tuple[int, ...]

    @property
    def length(self) -> float:
        """Acceptance length, pooled, bonus token included; 1 where nothing was drafted."""
        return self.counts.acceptance_length or 1.0


@dataclass(frozen=True)
class Measurement:
    """All runs, the first of which is the pair as it is."""

    runs: tuple[Run, ...]
    num_prompts: int
    max_new_tokens: int
    device: str
    dtype: str
    seconds: float


def findings_of(measurement: Measurement) -> Iterator[Finding]:
    """What the runs say about the pair."""
    as_given = [run for run in measurement.runs if run.shift == 0]
    if as_given:
        yield _acceptance(as_given[0])
    yield from _conventions(measurement.runs)
    yield from _modes(as_given)


def _acceptance(run: Run) -> Finding:
    if not run.counts.drafts:
        return info(
            "acceptance", "nothing was drafted: all responses ended at once", "other --prompts, or --max-tokens"
        )
    seen = f"acceptance length {run.length:.2f} (bonus token included, pooled over {run.counts.drafts} drafts)"
    if run.length >= LOWEST_LENGTH:
        return ok("acceptance", seen)
    return warning(
        "acceptance",
        f"{seen}: almost nothing that is drafted is accepted, so drafting costs more than it brings",
        "see the other findings; if there are none, the drafter is likely of another target or revision, or was "
        "trained on another kind of text than these prompts (--prompts)",
    )


def _conventions(runs: Sequence[Run]) -> Iterator[Finding]:
    """Compare the target layer ids with their neighbours. Runs of one mode only."""
    id, of_mode = "target-layer-convention", [run for run in runs if run.mode == runs[0].mode]
    given = next((run for run in of_mode if run.shift == 0), None)
    others = [run for run in of_mode if run.shift]
    if not others:
        return
    best = max(others, key=lambda run: run.length)
    change = f"set target_layer_ids to {list(best.layer_ids)}"
    if given is None:
        yield info(id, f"as given the ids reach beyond the target; {best.shift:+d} gives {best.length:.2f}", change)
    elif best.length <= given.length * RATIO:
        told = ", ".join(f"{run.shift:+d}: {run.length:.2f}" for run in others)
        yield ok(id, f"the ids as given are best ({given.length:.2f}; {told})")
    elif is_clearly_faster(best.drafts_by_prompt, given.drafts_by_prompt):
        yield warning(
            id,
            f"with every target layer id {best.shift:+d} the acceptance length is {best.length:.2f}, as given "
            f"{given.length:.2f}: the ids count from the wrong layer",
            change,
        )
    else:
        yield info(
            id,
            f"with every target layer id {best.shift:+d} the acceptance length is {best.length:.2f}, as given "
            f"{given.length:.2f}: that may be chance, with these {len(given.drafts_by_prompt)} prompts",
            f"--run {max(4 * len(given.drafts_by_prompt), 4 * FEWEST_PROMPTS)} tells more",
        )


def is_clearly_faster(fewer: Sequence[int], more: Sequence[int]) -> bool:
    """Whether the same texts take fewer drafts in one way than in another, prompt by prompt (a paired t-test).

    Greedy texts do not depend on the drafter, so each prompt is a pair. Where both ways are alike, 8 prompts call one
    faster by accident in 4 of 100 cases.
    """
    differences = [b - a for a, b in zip(fewer, more, strict=True)]
    if len(differences) < FEWEST_PROMPTS:
        return False
    mean, deviation = statistics.mean(differences), statistics.stdev(differences)
    return mean > STANDARD_ERRORS * deviation / len(differences) ** 0.5


def _modes(runs: Sequence[Run]) -> Iterator[Finding]:
    """Compare the template's modes."""
    lengths = {run.mode: run.length for run in runs}
    if THINKING not in lengths or NO_THINKING not in lengths:
        return
    (worse, low), (better, high) = sorted(lengths.items(), key=lambda entry: entry[1])
    seen = f"acceptance length {lengths[THINKING]:.2f} thinking, {lengths[NO_THINKING]:.2f} without"
    if high > low * MODE_RATIO:
        flag = "true" if better == THINKING else "false"
        yield warning(
            "thinking",
            f"{seen}: the drafter is made for {better}, not for {worse}",
            f'ask with "chat_template_kwargs": {{"enable_thinking": {flag}}} (vllm serve: '
            f"--default-chat-template-kwargs '{{\"enable_thinking\": {flag}}}'), or take a drafter for {worse}",
        )
    else:
        yield ok("thinking", seen)
