# SPDX-License-Identifier: Apache-2.0
"""Every how many steps prompts are let in, where a step that reads prompts costs more than the prompts' own work.

A step of decodes alone runs as one CUDA graph. One that also reads a prompt runs layer by layer: on a small target the
host's launches then take longer than the device. Let in together at every k-th step, prompts pay for that once in k
steps. What it costs them is waiting, (k-1)/2 steps on average. A request of S steps takes

    (S + (k-1)/2) * (t + a/k)    with t: a step with its share of prompts' tokens, a: more for reading any prompt,

and k is chosen to make this least. t and a come from the steps' own durations. Torch-free.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

#: A request must take so much less for prompts to wait at all.
WORTH = 0.95
MOST = 8
_REMEMBERED, _ENOUGH = 128, 48  # steps
_DECIDE_STEPS = 32
#: While prompts are let in at every step, one step of so many without, to see what it takes.
_PROBE_STEPS = 16
#: A longer step was held up by something else. Of eight steps, one may read all the prompts.
_LONGEST = 2.0  # times the 95th percentile


@dataclass(frozen=True)
class StepSeen:
    """One step and the one before, whose work the device may still have been at."""

    ms: float
    prompt_tokens: int
    prompt_tokens_before: int


@dataclass(frozen=True)
class StepModel:
    """t and a of the module's docstring, ms."""

    step_ms: float
    reading_ms: float


class PrefillCadence:
    """Learns from one engine's steps."""

    def __init__(self) -> None:
        self.interval = 1
        self._steps: deque[StepSeen] = deque(maxlen=_REMEMBERED)
        self._begun: float | None = None
        self._tokens = self._tokens_before = 0
        self._number = self._since_prompts = 0
        self._new_requests: deque[tuple[int, int]] = deque(maxlen=_REMEMBERED)  # that began, and that ran

    def defers(self, now: float) -> bool:
        """A step begins, at `now` s: whether prompts wait for a later one."""
        if self._begun is not None:
            self._steps.append(StepSeen(1e3 * (now - self._begun), self._tokens, self._tokens_before))
        self._begun = now
        self._number += 1
        if self._number % _DECIDE_STEPS == 0:
            self._decide()
        if self.interval == 1:
            return self._number % _PROBE_STEPS == 0
        return self._since_prompts < self.interval - 1

    def note(self, prompt_tokens: int, new_requests: int, running: int) -> None:
        """What the step holds: tokens of prompts, requests that begin, and that decode."""
        self._tokens_before, self._tokens = self._tokens, prompt_tokens
        self._since_prompts = 0 if prompt_tokens else self._since_prompts + 1
        self._new_requests.append((new_requests, running))

    def pause(self) -> None:
        """Nothing is left to do."""
        self._begun = None

    def _decide(self) -> None:
        model = fitted(self._steps)
        began, ran = (sum(column) for column in zip(*self._new_requests, strict=True)) if self._new_requests else (0, 0)
        if model is None or not began:
            self.interval = 1
            return
        self.interval = best_interval(model, steps=ran / began)  # Little's law: requests there / requests a step


def fitted(steps: deque[StepSeen]) -> StepModel | None:
    """By least squares; None: too few steps, or all alike."""
    ms = np.array([step.ms for step in steps])
    if len(ms) < _ENOUGH:
        return None
    tokens = np.array([(step.prompt_tokens, step.prompt_tokens_before) for step in steps], dtype=np.float64)
    kept = ms <= _LONGEST * np.quantile(ms, 0.95)
    ms, tokens, reads = ms[kept], tokens[kept], tokens[kept] > 0
    if reads[:, 0].all() or not reads[:, 0].any():
        return None
    scale = max(1.0, tokens.max())
    design = np.column_stack((np.ones(len(ms)), reads, tokens / scale))
    constant, now, before, per_token, per_token_before = np.linalg.lstsq(design, ms, rcond=None)[0]
    prompts = (per_token + per_token_before) * (tokens[:, 0] / scale).mean()
    return StepModel(max(1e-3, constant + max(0.0, prompts)), max(0.0, now + before))


def best_interval(model: StepModel, steps: float) -> int:
    """k for requests of so many steps."""
    intervals = np.arange(1, MOST + 1)
    times = (steps + (intervals - 1) / 2) * (model.step_ms + model.reading_ms / intervals)
    best = int(times.argmin())
    return int(intervals[best]) if times[best] < WORTH * times[0] else 1
