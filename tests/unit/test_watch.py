# SPDX-License-Identifier: Apache-2.0
"""When the log is warned, on a clock of our own."""

from __future__ import annotations

import pytest

from vllm_dflash.compat.metrics.report import StepReport, StepTimes
from vllm_dflash.compat.metrics.watch import MIN_REPEATS, QUIET_SECONDS, AcceptanceWatch, PrefixCacheWatch


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def stretch(
    watch: AcceptanceWatch, clock: Clock, accepted_each: float, report: StepReport, steps: int = 100
) -> list[str]:
    """100 steps of 20 drafts, 0.7 s apart: 2000 drafts in 70 s. What was said."""
    said = []
    for _ in range(steps):
        clock.now += 0.7
        text = watch.see(20, round(20 * accepted_each), report)
        said += [text] if text else []
    return said


FREE = StepReport(times=StepTimes(1000, 0))


def test_a_collapsed_acceptance_is_said_once_an_hour(clock: Clock) -> None:
    watch = AcceptanceWatch(clock)
    said = stretch(watch, clock, 0.1, StepReport(), steps=400)
    assert len(said) == 1
    assert said[0].startswith("acceptance length 1.10 over the last 2000 drafts (70 s) is below 1.25")
    assert "vllm-dflash doctor" in said[0] and "\n" not in said[0]
    clock.now += QUIET_SECONDS
    assert len(stretch(watch, clock, 0.1, StepReport(), steps=400)) == 1


@pytest.mark.parametrize(
    ("report", "accepted_each", "is_said"),
    [
        (FREE, 0.3, False),
        (FREE, 0.2, True),
        (StepReport(times=StepTimes(1000, 600)), 0.5, True),  # 1.5 tokens in 1.6 times the time
        (StepReport(times=StepTimes(1000, 600)), 0.7, False),
        (StepReport(times=StepTimes(1000, 600), break_even=2.5), 1.0, True),  # verifying takes longer as well
        (StepReport(times=StepTimes(1000, 600), break_even=2.5), 1.6, False),
    ],
)
def test_break_even(clock: Clock, report: StepReport, accepted_each: float, is_said: bool) -> None:
    assert bool(stretch(AcceptanceWatch(clock), clock, accepted_each, report)) is is_said


def test_the_numbers_that_are_named(clock: Clock) -> None:
    (text,) = stretch(AcceptanceWatch(clock), clock, 0.5, StepReport(times=StepTimes(1000, 600)))
    assert "acceptance length 1.50" in text and "below 1.60: drafting adds 60 % to the time of a step" in text
    (text,) = stretch(AcceptanceWatch(clock), clock, 0.5, StepReport(break_even=2.5))
    assert "below 2.50: by measured costs a step takes 2.50 times as long" in text


def test_too_little_to_tell(clock: Clock) -> None:
    watch = AcceptanceWatch(clock)
    assert watch.see(1999, 0, FREE) is None  # in no time
    clock.now += 1000
    assert AcceptanceWatch(clock).see(1999, 0, FREE) is None
    assert watch.see(1, 0, FREE) is not None  # 2000 drafts in 1000 s


def test_a_bad_minute_among_good_ones_is_a_stretch_of_its_own(clock: Clock) -> None:
    watch = AcceptanceWatch(clock)
    assert stretch(watch, clock, 3.0, FREE, steps=500) == []
    assert len(stretch(watch, clock, 0.1, FREE)) == 1


def ask(watch: PrefixCacheWatch, prompts: list[list[str]], tokens: int, hits: int) -> list[str]:
    """One lookup after the other."""
    said = []
    for blocks in prompts:
        watch.see_prompt(blocks)
        text = watch.see_lookups(1, tokens, hits)
        said += [text] if text else []
    return said


SAME = [["first", "second", "third"]]


def test_prompts_that_repeat_and_find_nothing(clock: Clock) -> None:
    watch = PrefixCacheWatch(clock)
    said = ask(watch, SAME * (1 + 10 * MIN_REPEATS), tokens=48, hits=0)
    assert len(said) == 1
    # The first prompt repeats none, the 64 after it do.
    assert said[0].startswith("the prefix cache found 0 of the 3120 tokens of the last 65 prompts, although 64 of them")
    clock.now += QUIET_SECONDS
    assert len(ask(watch, SAME * (2 * MIN_REPEATS), tokens=48, hits=0)) == 1


def test_a_cache_that_works_is_not_talked_of(clock: Clock) -> None:
    assert ask(PrefixCacheWatch(clock), SAME * 1000, tokens=48, hits=32) == []


def test_prompts_that_do_not_repeat(clock: Clock) -> None:
    """However many they are: there was nothing to find."""
    different = [[f"{index}", f"{index} and more"] for index in range(5000)]
    assert ask(PrefixCacheWatch(clock), different, tokens=100, hits=0) == []


def test_one_block_in_common_is_no_repeat(clock: Clock) -> None:
    """vLLM looks one block less far with a drafter, so that one block alone is never found."""
    prompts = [["first"], ["first", "own"], *(["first", f"{index}"] for index in range(500))]
    assert ask(PrefixCacheWatch(clock), prompts, tokens=30, hits=0) == []


def test_prompts_of_long_ago_are_forgotten(clock: Clock) -> None:
    watch = PrefixCacheWatch(clock)
    rounds = [["x", f"{index}"] for index in range(600)] * 3  # more different ones than are remembered
    assert ask(watch, rounds, tokens=30, hits=0) == []
