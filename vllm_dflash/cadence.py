# SPDX-License-Identifier: Apache-2.0
"""Every how many steps prompts are let in, where a step that reads prompts costs more than the prompts' own work.

A step of decodes alone runs as one CUDA graph. One that also reads a prompt runs layer by layer: on a small target the
host's launches then take longer than the device. Prompts that are let in together pay for that once. What it costs them
is waiting. With k: no prompt is let in for k-1 steps after one was, a request of S steps takes

    (S + w(k)) * (t + a / d(k))   t: a step with its share of prompts' tokens, a: more for reading any prompt

    d(k) = k + exp(-n k) / (1 - exp(-n))   steps from prompts to prompts: k, or until a request comes, where none did
    w(k) = k (k-1) / (2 d(k))              steps that a request waits: those that come within k steps, until these end

where requests come at random, n of them in a step on average. k is chosen to make this least. t and a come from the
steps' own durations. Torch-free.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

#: A request must take so much less for prompts to wait at all.
WORTH = 0.95
MOST = 8
_REMEMBERED, _ENOUGH = 256, 48  # steps
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
    """Of one engine: of a given interval, or of what its steps tell."""

    def __init__(self, interval: int | None = None) -> None:
        self.interval = interval or 1
        #: What the interval was chosen by, of learned ones.
        self.model: StepModel | None = None
        self._is_learned = interval is None
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
        if self._is_learned and self._number % _DECIDE_STEPS == 0:
            self._decide()
        if self._is_learned and self.interval == 1:
            return self._number % _PROBE_STEPS == 0
        return self._since_prompts < self.interval - 1

    def note(self, prompt_tokens: int, new_requests: int, running: int) -> None:
        """What the step holds: tokens of prompts, requests that begin, and that run."""
        self._tokens_before, self._tokens = self._tokens, prompt_tokens
        self._since_prompts = 0 if prompt_tokens else self._since_prompts + 1
        self._new_requests.append((new_requests, running))

    def pause(self) -> None:
        """The time until the next step is none of the last one's."""
        self._begun = None

    def _decide(self) -> None:
        self.model = fitted(self._steps)
        began, ran = (sum(column) for column in zip(*self._new_requests, strict=True)) if self._new_requests else (0, 0)
        if self.model is None or not began:
            self.interval = 1
            return
        # Little's law: a request takes as many steps as there are requests for each that begins in a step.
        self.interval = best_interval(self.model, ran / began, began / len(self._new_requests))


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


def best_interval(model: StepModel, steps: float, arrivals: float) -> int:
    """k for requests of so many steps, of which so many begin in a step on average."""
    intervals = np.arange(1, MOST + 1)
    apart = intervals + np.exp(-arrivals * intervals) / -np.expm1(-arrivals)
    waiting = intervals * (intervals - 1) / (2 * apart)
    times = (steps + waiting) * (model.step_ms + model.reading_ms / apart)
    best = int(times.argmin())
    return int(intervals[best]) if times[best] < WORTH * times[0] else 1
