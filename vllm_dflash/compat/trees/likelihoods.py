# SPDX-License-Identifier: Apache-2.0
"""The trees' likelihoods on the host, a step late, so that nobody waits for them.

Letters: S rows of the runner's state, N nodes.
"""

from __future__ import annotations

import numpy as np
import torch

#: How much of what is expected of a new request's tree is the last step's news.
_NEWS = 0.05


class HostLikelihoods:
    """What is known of every request's tree, and of a request that is new."""

    def __init__(self, max_num_reqs: int, num_nodes: int, device: torch.device) -> None:
        self.average = np.ones(num_nodes)  # [N] by place in the tree
        self.known = np.ones((max_num_reqs, num_nodes))  # [S, N]
        is_cuda = device.type == "cuda"
        self._on_host = torch.zeros(max_num_reqs, num_nodes, pin_memory=is_cuda)
        self._event = torch.cuda.Event() if is_cuda else None
        self._copied: np.ndarray | None = None  # rows of the copy that is under way
        self._has_news = False

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
        self.known[rows] = self._on_host.numpy()[rows]
        news = self.known[rows].mean(axis=0)
        self.average = (1 - _NEWS) * self.average + _NEWS * news if self._has_news else news
        self._has_news = True
