# SPDX-License-Identifier: Apache-2.0
"""Context of steps that drafted nothing, which is injected when somebody is about to draft.

Injecting a row for each of some requests takes as long as reading its weights takes, so that the rows of many steps
cost little more than those of one.

Letters: T context rows, F tapped layers, H hidden size, G KV-cache groups that hold draft layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_dflash.proposer.step import PADDING_SLOT, ContextRows
from vllm_dflash.proposer.tapped_states import TappedStates

#: From context features [T, F*H] and where they go to K/V in the draft layers' caches.
Inject = Callable[[torch.Tensor, ContextRows], None]

#: Rows of more requests than this keep a GPU busy by themselves.
_MAX_ROWS, _MAX_STEPS, _MOST_REQS = 512, 16, 128


class ContextBacklog:
    """The rows of the last steps, one of each request.

    A slot is its request's only while this runs, and in a window's cache only while later rows see it. Then it may
    become another's, even one of the target's layers. So what is kept has to be injected before a step that knows of a
    request's end, and with a step that is not kept, as nobody counts how far it takes a request.
    """

    def __init__(
        self,
        num_groups: int,  # G
        width: int,  # F*H
        smallest_window: int | None,  # slots; None: every layer sees everything
        max_rows: int,  # that `inject` takes at once
        dtype: torch.dtype,
        device: torch.device,
        inject: Inject,
    ) -> None:
        self._inject = inject
        self._max_steps = _MAX_STEPS if smallest_window is None else min(_MAX_STEPS, smallest_window - 1)
        self._max_rows = max_rows = min(_MAX_ROWS, max_rows)
        self._most_reqs = min(_MOST_REQS, max_rows)
        self._features = torch.zeros(max_rows, width, dtype=dtype, device=device)
        self._positions = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._slots = torch.full((num_groups, max_rows), PADDING_SLOT, dtype=torch.int64, device=device)
        self._num_steps = self._num_rows = 0
        self._has_lost_requests = False

    def keep(self, tapped: TappedStates, rows: ContextRows, num_reqs: int) -> bool:
        """Keep a step's rows. False: it is no step to be kept, and what is kept has to be injected."""
        if tapped.num_rows != num_reqs or num_reqs > self._most_reqs or self._max_steps < 2:
            return False
        if self._num_steps == self._max_steps or self._num_rows + num_reqs > self._max_rows:
            self.inject()
        start, end = self._num_rows, self._num_rows + num_reqs
        tapped.write(self._features[start:end], 0, tapped.num_rows)
        self._positions[start:end].copy_(rows.positions)
        self._slots[:, start:end].copy_(rows.slot_mappings)
        self._num_rows, self._num_steps = end, self._num_steps + 1
        return True

    def before_step(self, loses_requests: bool, has_rows: bool) -> None:
        """Call before a step changes anything: do requests end in it, or are they preempted, and does it run any rows?

        Without rows nothing is written: the caches of an engine that sleeps are gone. What it has freed is not
        another's before the next step with rows.
        """
        self._has_lost_requests |= loses_requests
        if self._has_lost_requests and has_rows:
            self.inject()

    def inject(self) -> None:
        """Write all that was kept into the caches."""
        self._has_lost_requests = False
        if self._num_steps:
            num_rows, self._num_rows, self._num_steps = self._num_rows, 0, 0
            self._inject(self._features[:num_rows], ContextRows(self._positions[:num_rows], self._slots[:, :num_rows]))
