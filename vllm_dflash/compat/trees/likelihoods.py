# SPDX-License-Identifier: Apache-2.0
"""The trees' likelihoods on the host, a step late, so that nobody waits for them.

Letters: S rows of the runner's state, N nodes.
"""

from __future__ import annotations

import numpy as np
import torch

#: How much of what is expected of a new request's tree is the last news, and how often it is asked for.
_NEWS, _NEWS_STEPS = 0.25, 8


class HostLikelihoods:
    """What is known of every request's tree, and of a request that is new."""

    def __init__(self, max_num_reqs: int, num_nodes: int, device: torch.device) -> None:
        self.average = np.ones(num_nodes)  # [N] by place in the tree
        self.known = np.ones((max_num_reqs, num_nodes))  # [S, N]
        is_cuda = device.type == "cuda"
        self._on_host = torch.zeros(max_num_reqs, num_nodes, pin_memory=is_cuda)
        self._read_from = self._on_host.numpy()
        self._event = torch.cuda.Event() if is_cuda else None
        self._copied: np.ndarray | None = None  # rows of the copy that is under way
        self._num_reads = 0

    def expect_average(self, state_row: int) -> None:
        """Of a request that takes this row."""
        self.known[state_row] = self.average
        if self._copied is not None:
            self._copied = self._copied[self._copied != state_row]

    def of(
        self,
        state_rows: np.ndarray,  # [R]
    ) -> np.ndarray:
        """[R, N], descending along N."""
        return self.known[state_rows]

    def copy(
        self,
        probs: torch.Tensor,  # [S, N] on the device
        state_rows: np.ndarray,  # [R] whose trees are new
    ) -> None:
        """Start to copy these. What was copied before has been read."""
        self._on_host.copy_(probs, non_blocking=True)
        if self._event is not None:
            self._event.record()
        self._copied = state_rows

    def read(self) -> None:
        """Know what was copied before."""
        rows, self._copied = self._copied, None
        if rows is None or not len(rows):
            return
        if self._event is not None:
            self._event.synchronize()
        news = self._read_from[rows]
        self.known[rows] = news
        if self._num_reads % _NEWS_STEPS == 0:
            share = _NEWS if self._num_reads else 1.0
            self.average = (1 - share) * self.average + share * news.mean(axis=0)
        self._num_reads += 1
