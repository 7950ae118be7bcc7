# SPDX-License-Identifier: Apache-2.0
"""How often prompts are admitted, where a step that reads prompts costs more than the prompts' own work.

A step of decodes alone runs as one CUDA graph. One that also reads a prompt runs layer by layer: on a small target the
host's launches then take longer than the device. Prompts that are admitted together pay for that once. What it costs
them is waiting. If after a step that reads prompts none are admitted for k-1 steps, a request of S steps takes

    (S + w(k)) * (t + a / d(k))   t: a step with its share of prompts' tokens, a: more for reading any prompt

    d(k) = k + exp(-n k) / (1 - exp(-n))   steps from prompts to prompts: k, or until a request comes, where none did
    w(k) = k (k-1) / (2 d(k))              steps that a request waits: those that come within k steps, until these end

where prompts come at random, n of them in a step on average. k is chosen to make this least. t and a come from the
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
#: With k = 1 or 2 prompts wait in one step of so many: of steps that are all alike, or that take turns, nothing can be
#: learned. Odd, so that with k = 2 it is a step's turn to read some.
_PROBE_STEPS = 15
#: A model that no steps have confirmed for so many is given up: with k = 1 it is learned anew.
_STANDS_STEPS = 1024
#: A longer step was held up by something else. With k = 8 one step of eight reads prompts: the percentile is of those.
_LONGEST = 2.0  # times the 95th percentile
#: Of the largest singular value: what is smaller is no difference between steps.
_DISTINCT = 1e-2


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
    """Of one engine: in which steps its prompts wait, by a given interval or by one learned from its steps."""

    def __init__(self, interval: int | None = None) -> None:
        self.interval = interval or 1
        #: Whether the log has said that prompts wait.
        self.is_told = False
        #: What the interval was chosen by, of learned ones.
        self.model: StepModel | None = None
        self._is_learned = interval is None
        self._steps: deque[StepSeen] = deque(maxlen=_REMEMBERED)
        self._begun: float | None = None
        self._tokens = self._tokens_before = 0
        self._number = self._since_prompts = self._learned_at = 0
        self._requests: deque[tuple[int, int, int]] = deque(maxlen=_REMEMBERED)  # prompts, requests begun, running

    def defers(self, now: float) -> bool:
        """A step begins, at `now` s: whether prompts wait for a later one."""
        if self._begun is not None:
            self._steps.append(StepSeen(1e3 * (now - self._begun), self._tokens, self._tokens_before))
        self._begun = now
        self._number += 1
        if self._is_learned and self._number % _DECIDE_STEPS == 0:
            self._decide()
        if self._is_learned and self.interval <= 2 and self._number % _PROBE_STEPS == 0:
            return True
        return self._since_prompts < self.interval - 1

    def note(self, prompt_tokens: int, new_prompts: int, new_requests: int, running: int) -> None:
        """What the step holds: tokens of prompts, prompts of which it reads the first, requests that begin, that run.

        A request whose prompt is in the prefix cache begins, but reads no prompt.
        """
        self._tokens_before, self._tokens = self._tokens, prompt_tokens
        self._since_prompts = 0 if prompt_tokens else self._since_prompts + 1
        self._requests.append((new_prompts, new_requests, running))

    def pause(self) -> None:
        """The time until the next step is none of the last one's."""
        self._begun = None

    def idle(self) -> None:
        """The step has nothing to do, for as long as it takes. Prompts have waited for it all the same."""
        self.pause()
        self._since_prompts += 1

    def _decide(self) -> None:
        self._learn()
        if not self._requests:
            return
        prompts, began, ran = (sum(column) for column in zip(*self._requests, strict=True))
        if self.model is None or not prompts:
            self.interval = 1
            return
        # Little's law: a request takes as many steps as there are requests for each that begins in a step.
        self.interval = best_interval(self.model, ran / began, prompts / len(self._requests))

    def _learn(self) -> None:
        found = fitted(self._steps)
        if found is not None:
            self.model, self._learned_at = found, self._number
        elif self._number - self._learned_at > _STANDS_STEPS:
            self.model = None


def fitted(steps: deque[StepSeen]) -> StepModel | None:
    """By least squares; None: too few steps, or none that tell one part from another."""
    ms = np.array([step.ms for step in steps])
    if len(ms) < _ENOUGH:
        return None
    tokens = np.array([(step.prompt_tokens, step.prompt_tokens_before) for step in steps], dtype=np.float64)
    kept = ms <= _LONGEST * np.quantile(ms, 0.95)
    ms, tokens, reads = ms[kept], tokens[kept], tokens[kept] > 0
    scale = max(1.0, tokens.max())
    design = np.column_stack((np.ones(len(ms)), reads, tokens / scale))
    parts, _, rank, _ = np.linalg.lstsq(design, ms, rcond=_DISTINCT)
    if rank < len(parts):
        return None
    constant, now, before, per_token, per_token_before = parts
    prompts = (per_token + per_token_before) * (tokens[:, 0] / scale).mean()
    return StepModel(float(max(1e-3, constant + max(0.0, prompts))), float(max(0.0, now + before)))


def best_interval(model: StepModel, steps: float, arrivals: float) -> int:
    """k for requests of so many steps, of which so many begin in a step on average."""
    intervals = np.arange(1, MOST + 1)
    apart = intervals + np.exp(-arrivals * intervals) / -np.expm1(-arrivals)
    waiting = intervals * (intervals - 1) / (2 * apart)
    times = (steps + waiting) * (model.step_ms + model.reading_ms / apart)
    best = int(times.argmin())
    return int(intervals[best]) if times[best] < WORTH * times[0] else 1
