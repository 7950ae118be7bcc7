# SPDX-License-Identifier: Apache-2.0
"""When prompts are admitted, on engines whose steps take what a formula says."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import numpy as np
import pytest

from vllm_dflash import cadence
from vllm_dflash.cadence import PrefillCadence, StepModel, StepSeen, best_interval, fitted


class Engine:
    """Steps of `plain_ms`, `reading_ms` more with any prompt and `token_ms` for each of its tokens.

    No step is quite like another. So many prompts of 200 tokens come with each on average.
    """

    def __init__(self, plain_ms: float, reading_ms: float, token_ms: float, arrivals: float, running: int) -> None:
        self.plain_ms, self.reading_ms, self.token_ms = plain_ms, reading_ms, token_ms
        self.arrivals, self.running = arrivals, running
        self.cadence, self.now, self.waiting = PrefillCadence(), 0.0, 0
        self.random = random.Random(3)
        self.admitted: list[int] = []

    def run(self, steps: int) -> None:
        for _ in range(steps):
            many = self.arrivals >= 1
            self.waiting += (
                self.random.randint(1, int(2 * self.arrivals) - 1) if many else self.random.random() < self.arrivals
            )
            begin = 0 if self.cadence.defers(self.now) else self.waiting
            self.waiting -= begin
            self.cadence.note(200 * begin, begin, begin, self.running)
            ms = self.plain_ms + self.reading_ms * (begin > 0) + 200 * begin * self.token_ms
            self.now += ms * self.random.uniform(0.8, 1.2) / 1e3
            self.admitted.append(begin)


def test_prompts_wait_where_reading_one_is_dear() -> None:
    engine = Engine(plain_ms=5.0, reading_ms=10.0, token_ms=0.001, arrivals=6, running=128)
    engine.run(400)
    assert engine.cadence.model is not None
    # S = 128 / 6 = 21.3 steps, t = 5 + 6 * 200 * 0.001 = 6.2: (21.3 + (k-1)/2) * (6.2 + 10/k) is least at k = 8.
    assert engine.cadence.interval in (7, 8)
    assert 54 <= engine.admitted[-64:].count(0) <= 56


def test_prompts_do_not_wait_where_a_step_is_its_rows() -> None:
    engine = Engine(plain_ms=40.0, reading_ms=0.5, token_ms=0.02, arrivals=2, running=64)
    engine.run(400)
    assert engine.cadence.interval == 1
    assert engine.admitted[-150:].count(0) == 10, "one step of 15 looks what a step without prompts takes"


def test_few_requests_begin_at_once() -> None:
    """One comes in 8 steps and takes 32: seldom are there two to read together."""
    engine = Engine(plain_ms=5.0, reading_ms=10.0, token_ms=0.0, arrivals=1 / 8, running=4)
    engine.run(2000)
    assert engine.cadence.interval == 1
    assert engine.cadence.model is not None
    assert engine.cadence.model.reading_ms == pytest.approx(10.0, rel=0.1)


def test_a_given_interval_is_kept() -> None:
    engine = Engine(plain_ms=5.0, reading_ms=0.0, token_ms=0.0, arrivals=6, running=128)
    engine.cadence = PrefillCadence(5)
    engine.run(400)
    assert engine.cadence.interval == 5
    assert 79 <= sum(begin > 0 for begin in engine.admitted) <= 81


def test_the_load_changes() -> None:
    engine = Engine(plain_ms=5.0, reading_ms=10.0, token_ms=0.001, arrivals=6, running=128)
    engine.run(400)
    assert engine.cadence.interval > 4
    engine.reading_ms = 0.1
    engine.run(400)
    assert engine.cadence.interval == 1


def test_steps_without_work_are_waited_for_no_longer_than_others() -> None:
    paced = PrefillCadence(4)
    assert paced.defers(0.0) is True
    paced.note(200, 1, 1, 1)
    waits = []
    for now in range(1, 5):
        waits.append(paced.defers(float(now)))
        paced.idle()
    assert waits == [True, True, True, False]


def test_a_pause_is_no_step() -> None:
    paced = PrefillCadence()
    for now in (0.0, 0.005):
        paced.defers(now)
        paced.note(0, 0, 0, 1)
    paced.pause()
    paced.defers(100.0)
    assert [step.ms for step in paced._steps] == pytest.approx([5.0])


def test_steps_that_take_turns_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """With k = 2 every other step reads prompts, and none says what it would take beside one of its kind."""
    monkeypatch.setattr(cadence, "best_interval", lambda *_: 2)
    engine = Engine(plain_ms=20.0, reading_ms=5.0, token_ms=0.001, arrivals=2, running=24)
    engine.run(600)
    assert engine.cadence.model is not None
    assert engine.cadence.model.step_ms == pytest.approx(20.4, rel=0.15)
    assert engine.cadence.model.reading_ms == pytest.approx(5.0, abs=2.5)
    # Of 15 steps one more has none, and the turns change: seven of 15 read prompts.
    assert engine.admitted[-150:].count(0) == 80


@pytest.mark.parametrize("prompts_every", [10, 1000])
def test_requests_whose_prompts_are_in_the_cache_wait_for_nobody(prompts_every: int) -> None:
    """Eight begin in a step, and of 80, or of none of these, is a prompt read.

    With n = 0.1 and 128 / 8 steps, d(1) = 10.51 and 16 * 5.95 = 95; with k = 8, d = 12.72, w = 2.20: 18.2 * 5.79 = 105.
    """
    paced = PrefillCadence()
    paced.model, paced.interval = StepModel(5.0, 10.0), 8
    with np.errstate(all="raise"):
        for number in range(1, 65):
            paced.defers(5e-3 * number)
            reads = number % prompts_every == 0
            paced.note(200 * reads, int(reads), 8, 128)
    assert paced.interval == 1


def test_what_is_known_stands_until_more_is() -> None:
    """Every step that reads prompts reads as many tokens: what of that is for reading any?"""
    paced, known = PrefillCadence(), StepModel(5.0, 10.0)
    paced.model = known
    for number in range(300):
        paced.defers(5e-3 * number)
        reads = number % 3 == 0
        paced.note(1200 * reads, 6 * reads, 6 * reads, 128)
    assert paced.model == known
    # Two in a step, of 128 / 2 steps each: d(1) = 1.16 and 64 * 13.6 = 873; 67.5 * 6.25 = 422.
    assert paced.interval == 8


def test_what_steps_no_longer_confirm_is_given_up() -> None:
    """Every step that reads prompts still reads as many tokens, but reading any costs nothing now."""
    paced = PrefillCadence()
    paced.model, paced.interval = StepModel(5.0, 10.0), 8
    waiting = now = 0.0
    read = []
    for _ in range(2000):
        waiting += 4
        begin = 0 if paced.defers(now) else int(waiting)
        waiting -= begin
        paced.note(256 * begin, begin, begin, 64)
        now += (60.0 + 0.01 * begin) / 1e3
        read.append(begin)
    assert read[:1000].count(0) == pytest.approx(1000 * 7 / 8, abs=8), "what is known stands for a while"
    assert paced.interval == 1


def test_an_engine_that_was_only_paused_has_nothing_to_say() -> None:
    paced = PrefillCadence()
    for now in range(64):
        paced.defers(float(now))
        paced.pause()
    assert paced.interval == 1


def steps_that_take(ms: Callable[[int, int], float]) -> deque[StepSeen]:
    """By the tokens of prompts that a step reads, and that the one before has read: 110 a step."""
    tokens = [0, 0, 300, 0, 100, 200, 0, 0, 0, 500] * 8
    return deque(StepSeen(ms(now, before), now, before) for before, now in zip([0, *tokens], tokens, strict=False))


def test_a_fit_takes_apart_what_steps_and_those_before_them_cost() -> None:
    """7 ms, 2 and 3 more where this step and the one before read prompts, 0.01 and 0.02 for each of their tokens."""
    found = fitted(
        steps_that_take(lambda now, before: 7 + 2 * (now > 0) + 3 * (before > 0) + 0.01 * now + 0.02 * before)
    )
    assert found is not None
    assert found.reading_ms == pytest.approx(5.0)
    assert found.step_ms == pytest.approx(7 + 0.03 * 110)  # 1100 tokens in ten steps


def test_tokens_do_not_make_steps_shorter() -> None:
    """That they seem to is noise."""
    found = fitted(steps_that_take(lambda now, before: 7 + 5 * (now > 0) - 0.005 * now))
    assert found is not None
    assert (found.step_ms, found.reading_ms) == (pytest.approx(7.0), pytest.approx(5.0))


@pytest.mark.parametrize(
    "tokens",
    [
        [0],
        [100],
        [0, 100, 0, 300],  # by turns: of each, the one before is of the other kind
        [0, 0, 2000, 0, 0],  # what of 2000 tokens' time is for reading any?
        [0, 0, 2000, 0, 0, 0, 0, 2001, 0, 0],
    ],
)
def test_steps_that_cannot_be_told_apart_tell_nothing(tokens: list[int]) -> None:
    ran = tokens * 40
    assert fitted(deque(StepSeen(5.0, now, before) for before, now in zip(ran, ran[1:], strict=False))) is None


def test_a_step_that_something_else_held_up_is_left_out() -> None:
    """One of 1000 ms; with it, reading would seem to make steps shorter."""
    steps = steps_that_take(lambda now, before: 7 + 5 * (now > 0) + 0.01 * now)
    steps[50] = StepSeen(1000.0, steps[50].prompt_tokens, steps[50].prompt_tokens_before)
    found = fitted(steps)
    assert found is not None
    assert (found.step_ms, found.reading_ms) == (pytest.approx(7 + 0.01 * 8800 / 79), pytest.approx(5.0))


@pytest.mark.parametrize(
    ("step_ms", "reading_ms", "steps", "arrivals", "expected"),
    [
        # Some come in every step, so that d(k) = k.
        (6.0, 10.0, 20.0, 20.0, 8),  # (20 + 3.5) * 7.25 = 170 to 20 * 16 = 320; at 7: 23 * 7.43 = 171
        (20.0, 2.0, 4.0, 20.0, 1),  # 4 * 22 = 88; at 2: 4.5 * 21 = 94.5
        (20.0, 0.5, 200.0, 20.0, 1),  # at 3: 201 * 20.17 = 4053 to 200 * 20.5 = 4100: 1 % is not worth it
        (10.0, 5.0, 10.0, 20.0, 3),  # 150; at 2: 131.25, at 3: 128.3, at 4: 129.4
        # One comes in five steps: d(1) = 1 / 0.18127 = 5.52, d(8) = 8 + 0.2019 / 0.18127 = 9.11, w(8) = 3.07.
        (5.0, 10.0, 35.0, 0.2, 1),  # 35 * 6.81 = 238 to 38.07 * 6.10 = 232: 3 %
        (5.0, 40.0, 35.0, 0.2, 8),  # 35 * 12.25 = 429 to 38.07 * 9.39 = 357; at 7: d = 8.36, w = 2.51: 367
        # One in a step: d(1) = 1 / 0.63212 = 1.58, and 35 * 11.3 = 396 to 38.5 * 6.25 = 241.
        (5.0, 10.0, 35.0, 1.0, 8),
    ],
)
def test_the_interval_that_ends_requests_first(
    step_ms: float, reading_ms: float, steps: float, arrivals: float, expected: int
) -> None:
    assert best_interval(StepModel(step_ms, reading_ms), steps, arrivals) == expected
