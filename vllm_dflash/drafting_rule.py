# SPDX-License-Identifier: Apache-2.0
"""Whether a step drafts, and which steps find out what is not known: an unlikely draft, or what steps without one take.

Torch-free.
"""

from __future__ import annotations

from vllm_dflash.budget import Choice

#: While nothing is drafted, one step of so many drafts all the same: is it worth it again?
PROBE_STEPS = 48
#: While trees are drafted, so many steps of so many do without: what does such a step take? The first ones come sooner.
COMPARED_STEPS, COMPARE_EVERY, COMPARE_FIRST = 3, 256, 32
#: No step without drafting is so many times shorter than one with it, so that there is nothing to find out.
_SURE_LENGTH = 3.0
#: The weight of the last trees in the running average that drafting is judged by; of the first ones it is the mean.
_NEWS = 1 / 16


class DraftingGain:
    """What drafting has gained since it began, a request and step. Of one tree little follows for the next one.

    Code is drafted well but for a name here and there: where the last tree says nothing, the next one may say much.
    """

    def __init__(self) -> None:
        self._mean, self._count = 0.0, 0

    def pays(self, last: Choice, is_new: bool) -> bool:
        """Whether to draft: on the running average, or because the last trees are better than that.

        `is_new`: they have not been asked about before.
        """
        if is_new:
            self._count += 1
            self._mean += max(_NEWS, 1 / self._count) * (last.gain - self._mean)
        pays = last.is_worth_drafting or (self._count > 0 and self._mean >= 0.0)
        if not pays:  # what was, under another load perhaps, does not count against the next attempt
            self._mean, self._count = 0.0, 0
        return pays


class DraftingRule:
    """Decides it step by step."""

    def __init__(self) -> None:
        self._gain = DraftingGain()
        self._num_without = 0  # steps since drafting stopped
        self._next_comparison, self._compared_until = COMPARE_FIRST, 0  # steps, by number

    def drafts(self, choice: Choice, step: int, num_reqs: int, is_new: bool, is_timed: bool) -> bool:
        """Whether step number `step` drafts for its requests, of whose last trees `choice` is made.

        `is_new`: no step has asked about these trees before. `is_timed`: something can be learned from how long this
        step takes.
        """
        if not self._gain.pays(choice, is_new):
            self._num_without += 1
            self._next_comparison = step + COMPARE_EVERY
            return self._num_without % PROBE_STEPS == 0
        self._num_without = 0
        if is_timed and step >= self._next_comparison and choice.expected < _SURE_LENGTH * num_reqs:
            self._next_comparison, self._compared_until = step + COMPARE_EVERY, step + COMPARED_STEPS
        return step >= self._compared_until
