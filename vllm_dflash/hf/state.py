# SPDX-License-Identifier: Apache-2.0
"""What one round hands to the next, all of it on the device.

Letters: B sequences, T new context rows, F tapped layers, H hidden size, D depths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from vllm_dflash.hf.calibration import Calibration


@dataclass(frozen=True)
class ContextRows:
    """Features of rows that the target ran since the last draft. Rows that do not count are padding."""

    features: torch.Tensor  # [B, T, F*H]
    positions: torch.Tensor  # [B, T]
    is_real: torch.Tensor  # [B, T] bool

    def first(self, count: int) -> ContextRows:
        """The first `count` rows."""
        return ContextRows(self.features[:, :count], self.positions[:, :count], self.is_real[:, :count])


@dataclass(frozen=True)
class RoundState:
    """Where the texts of a batch are."""

    anchors: torch.Tensor  # [B]; each text's last token, which the target has not seen
    lengths: torch.Tensor  # [B]; tokens before it
    context: ContextRows
    calibration: Calibration

    def with_context(self, count: int) -> RoundState:
        """With the first `count` rows of the context."""
        return replace(self, context=self.context.first(count))

    def clone(self) -> RoundState:
        """The same in memory of its own."""
        context = ContextRows(*(part.clone() for part in parts(self.context)))
        return RoundState(self.anchors.clone(), self.lengths.clone(), context, self.calibration.clone())

    def copy_(self, other: RoundState) -> None:
        """Overwrite this one's memory."""
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine.copy_(theirs)

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from (self.anchors, self.lengths)
        yield from parts(self.context)
        yield from parts(self.calibration)


def parts(group: ContextRows | Calibration) -> Iterator[torch.Tensor]:
    """Its tensors."""
    yield from vars(group).values()


@dataclass(frozen=True)
class Window:
    """How much of the caches a round's attention gets: up to the last row that is written, or a fixed size."""

    longest: int  # slots that the longest text uses
    size: int | None = None

    @property
    def is_exact(self) -> bool:
        return self.size is None

    def slots(self, num_rows: int) -> int:
        """Of a forward over so many rows behind the texts."""
        return self.longest + num_rows if self.size is None else self.size


@dataclass(frozen=True)
class RoundReport:
    """What a round tells the host."""

    tokens: torch.Tensor  # [B, D+2] int64: the accepted tokens, how many count, the target's token after them
    expected: torch.Tensor | None  # [budgets] fp32; acceptance that the drafter expected of trees of these sizes
