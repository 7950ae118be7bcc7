# SPDX-License-Identifier: Apache-2.0
"""Which sequences stand in which batch of an epoch: the same for the same seed, so that a step can be looked up."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PlannedBatch:
    """Some sequences and the length that all are padded to."""

    indices: tuple[int, ...]
    padded_length: int


class BatchPlan:
    """All epochs' batches. Every epoch has as many, in new random batches."""

    def __init__(self, lengths: Sequence[int], max_length: int, batch_tokens: int, seed: int) -> None:
        """`lengths` of the sequences; longer ones than `max_length` are cut. A batch has at most `batch_tokens` padded
        tokens, or one sequence. Raises ValueError where there are no sequences.
        """
        if not lengths:
            raise ValueError("there are no sequences to train on")
        self.batch_tokens, self.seed = batch_tokens, seed
        self._buckets: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            size = min(padded(min(length, max_length)), max_length)
            self._buckets.setdefault(size, []).append(index)
        self.epoch_size = sum(-(-len(members) // self._rows(size)) for size, members in self._buckets.items())
        self._epochs: dict[int, list[PlannedBatch]] = {}

    def batch(self, number: int) -> PlannedBatch:
        """The `number`-th batch of the training, counted from 0."""
        epoch, place = divmod(number, self.epoch_size)
        if epoch not in self._epochs:
            self._epochs = {epoch: self._planned(epoch)}  # one is enough: numbers rise
        return self._epochs[epoch][place]

    def _planned(self, epoch: int) -> list[PlannedBatch]:
        rng = random.Random(f"{self.seed}:{epoch}")
        batches = []
        for size, members in sorted(self._buckets.items()):
            order = rng.sample(members, len(members))
            rows = self._rows(size)
            batches += [PlannedBatch(tuple(order[i : i + rows]), size) for i in range(0, len(order), rows)]
        rng.shuffle(batches)
        return batches

    def _rows(self, padded_length: int) -> int:
        return max(1, self.batch_tokens // padded_length)


def padded(length: int) -> int:
    """The next of 64, 96, 128, 192, 256, 384, ...: at most half of a sequence is padding, and shapes are few."""
    size = 64
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size
