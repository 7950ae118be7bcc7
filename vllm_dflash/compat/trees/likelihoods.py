# SPDX-License-Identifier: Apache-2.0
"""The trees' likelihoods on the host, a step late, so that nobody waits for them.

Letters: S rows of the runner's state, N nodes.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from vllm.utils.torch_utils import current_stream

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
        self._is_marked = False
        self._copied: np.ndarray | None = None  # rows of the copy that is under way
        self.num_reads = 0

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
        self._copied = state_rows
        self.mark()

    def mark(self) -> None:
        """Remember how far the device has been told to go."""
        self._is_marked = True
        if self._event is not None:
            self._event.record(current_stream())  # vLLM remembers it; torch looks it up

    def read(self) -> float | None:
        """Know what was copied before. Returns for how many milliseconds it waited for the device to come so far.

        None: nothing was marked, so that it did not look.
        """
        waited_ms = self._wait() if self._is_marked else None
        rows, self._copied, self._is_marked = self._copied, None, False
        if rows is not None and len(rows):
            self._learn(rows)
        return waited_ms

    def _wait(self) -> float:
        if self._event is None or self._event.query():
            return 0.0
        begun = time.perf_counter()
        self._event.synchronize()
        return 1e3 * (time.perf_counter() - begun)

    def _learn(
        self,
        rows: np.ndarray,  # [R] of the state
    ) -> None:
        """Take over what is on the host by now."""
        news = self._read_from[rows]
        self.known[rows] = news
        if self.num_reads % _NEWS_STEPS == 0:
            share = _NEWS if self.num_reads else 1.0
            self.average = (1 - share) * self.average + share * news.mean(axis=0)
        self.num_reads += 1
