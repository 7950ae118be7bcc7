# SPDX-License-Identifier: Apache-2.0
"""Cached features of the next batch, read while the device computes this one.

Letters: B sequences, S padded length, F tapped layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from vllm_dflash.training.batch_plan import BatchPlan

#: Features [B, S, F*H] of sequences, padded to so many tokens, on the host.
ReadFeatures = Callable[[Sequence[int], int], Tensor]


class ReadAhead:
    """One thread, one batch ahead."""

    def __init__(self, read: ReadFeatures, plan: BatchPlan, stride: int, device: torch.device) -> None:
        """stride: from a batch's number to that of the next one here; other ranks have those between."""
        self._read, self._plan, self._stride = read, plan, stride
        # Pinned memory belongs to a device: in a new thread, to the first one.
        start = partial(torch.cuda.set_device, _index_of(device)) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="features", initializer=start)
        self._next: tuple[int, Future[Tensor]] | None = None

    def take(self, number: int) -> Tensor:
        """Features of the `number`-th batch: [B, S, F*H]. Raises what reading them raises."""
        ahead = self._next if self._next is not None and self._next[0] == number else self._begin(number)
        features = ahead[1].result()
        self._next = self._begin(number + self._stride)
        return features

    def _begin(self, number: int) -> tuple[int, Future[Tensor]]:
        planned = self._plan.batch(number)
        return number, self._thread.submit(self._read, planned.indices, planned.padded_length)


def _index_of(device: torch.device) -> int:
    """Plain "cuda" is the current device."""
    return torch.cuda.current_device() if device.index is None else device.index
