# SPDX-License-Identifier: Apache-2.0
"""Which sequences stand in which batch of an epoch: the same for the same seed, so that a step can be looked up."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PlannedBatch:
    """Some sequences and the length that all are padded to."""

    indices: tuple[int, ...]
    padded_length: int


class BatchPlan:
    """All epochs' batches. Each holds sequences of neighbouring lengths; which ones they are changes from epoch to
    epoch, the batches' shapes do not.
    """

    def __init__(self, lengths: Sequence[int], max_length: int, batch_tokens: int, seed: int) -> None:
        """`lengths` of the sequences; longer ones than `max_length` are cut. A batch has at most `batch_tokens` padded
        tokens, or one sequence. Raises ValueError where there are no sequences.
        """
        if not lengths:
            raise ValueError("there are no sequences to train on")
        self.batch_tokens, self.seed = batch_tokens, seed
        sizes = [min(padded(min(length, max_length)), max_length) for length in lengths]
        self._alike: dict[int, list[int]] = {}  # sequences by padded length
        for index, size in sorted(enumerate(sizes), key=lambda item: item[1]):
            self._alike.setdefault(size, []).append(index)
        self._shapes = list(self._cut(sorted(sizes)))
        self.epoch_size = len(self._shapes)
        self._epochs: dict[int, list[PlannedBatch]] = {}

    def batch(self, number: int) -> PlannedBatch:
        """The `number`-th batch of the training, counted from 0."""
        epoch, place = divmod(number, self.epoch_size)
        if epoch not in self._epochs:
            self._epochs = {epoch: self._planned(epoch)}  # one is enough: numbers rise
        return self._epochs[epoch][place]

    def _planned(self, epoch: int) -> list[PlannedBatch]:
        rng = random.Random(f"{self.seed}:{epoch}")
        order = [index for members in self._alike.values() for index in rng.sample(members, len(members))]
        batches, start = [], 0
        for rows, size in self._shapes:
            batches.append(PlannedBatch(tuple(order[start : start + rows]), size))
            start += rows
        rng.shuffle(batches)
        return batches

    def _cut(self, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Sequences and padded length of the batches that rising padded lengths are cut into."""
        rows = 0
        for number, size in enumerate(sizes):
            if rows and (rows + 1) * size > self.batch_tokens:
                yield rows, sizes[number - 1]
                rows = 0
            rows += 1
        yield rows, sizes[-1]


def padded(length: int) -> int:
    """The next of 64, 72, 80, ..., 128, 144, 160, ..., 256, 288, ...: little of it is padding, and shapes are few."""
    size = max(64, length)
    step = 1 << (size.bit_length() - 4)  # an eighth of the power of two below
    return -(-size // step) * step
