# SPDX-License-Identifier: Apache-2.0
"""Hidden states of the tapped layers, which are put side by side only where they are read.

Letters: T rows of the step, C context rows, F tapped layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_dflash.kernels.gather_features import gather_features


@dataclass(frozen=True)
class TappedStates:
    """Context features to be."""

    states: Sequence[torch.Tensor]  # F tensors [>= T, H]
    num_rows: int  # C
    rows: torch.Tensor | None = None  # [C] which of the T; None: the first C

    def write(
        self,
        out: torch.Tensor,  # [end - start, F*H]
        start: int,
        end: int,
    ) -> None:
        """Context features of rows start..end-1."""
        if self.rows is not None:
            gather_features(out, self.states, self.rows[start:end])
        else:
            torch.cat([states[start:end] for states in self.states], dim=-1, out=out)

    def features(self, start: int, end: int) -> torch.Tensor:
        """The same in new memory, [end - start, F*H]."""
        width = sum(states.shape[1] for states in self.states)
        out = self.states[0].new_empty(end - start, width)
        self.write(out, start, end)
        return out
