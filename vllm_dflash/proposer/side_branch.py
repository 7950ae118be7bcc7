# SPDX-License-Identifier: Apache-2.0
"""Work beside the current stream's, eager or as a branch of the CUDA graph that is being captured."""

from __future__ import annotations

from collections.abc import Callable

import torch


class SideBranch:
    """One branch at a time, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def start(self, work: Callable[[], None]) -> None:
        """Launch `work`, after all that the current stream has been given so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            work()

    def join(self) -> None:
        """What the current stream is given from now on runs after the branch."""
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
