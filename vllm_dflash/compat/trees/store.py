# SPDX-License-Identifier: Apache-2.0
"""The trees that requests are to verify, by row of the runner's state: drafted in one step, read in the next.

Letters: S rows of the state, D depths, R requests that verify.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_dflash.compat.ownership import TreeShape
from vllm_dflash.kernels.calibrate import Observations
from vllm_dflash.kernels.tree_build import TreeBuffers
from vllm_dflash.kernels.tree_rows import VerifiedRows, write_verified_rows

Made = TypeVar("Made")


@dataclass(frozen=True)
class TreeStep:
    """What the target's attention needs of a step that verifies trees. The requests that do lead the batch."""

    rows: VerifiedRows  # of all requests
    num_reqs: int  # that verify, each of one row besides its candidates
    num_rows: int  # of these requests
    max_rows: int  # of one of them
    is_whole: bool  # in a graph: every request of the batch, and metadata of its own
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, metadata: Any, make: Callable[..., Made], *others: Hashable) -> Made:
        """What a layer makes of the batch's metadata (and others), made once for all layers that share them."""
        key = (id(metadata), make, *others)
        if key not in self._made:
            self._made[key] = make(self, metadata, *others)
        made: Made = self._made[key]
        return made

    @cached_property
    def of_verifying(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The verifying requests' rows of the state, first rows and numbers of rows, [R] each."""
        rows = self.rows
        return rows.state_rows[: self.num_reqs], rows.first_rows[: self.num_reqs], rows.num_rows[: self.num_reqs]


class TreeStore:
    """Fixed memory for one tree a request."""

    def __init__(self, max_num_reqs: int, max_num_rows: int, shape: TreeShape, device: torch.device) -> None:
        self.shape = shape
        self.trees = TreeBuffers.allocate(max_num_reqs, shape.num_nodes, device)
        self.rows = VerifiedRows.allocate(max_num_reqs, max_num_rows, device)
        # Which of the verified rows were accepted, the root's being 0: [S, D], anything behind the last one.
        self.way = torch.zeros(max_num_reqs, shape.num_depths, dtype=torch.int32, device=device)
        self.as_chain = torch.zeros(max_num_reqs, dtype=torch.bool, device=device)  # [S]
        self.seen = Observations.allocate(max_num_reqs, shape.num_depths, shape.num_choices, device)
        self._new: dict[int, bool] = {}  # rows that requests have taken since the last step: is it a chain's?
        self.step: TreeStep | None = None  # None: no request verifies anything
        # Rows of the graphs for steps without candidates, where graphs are of two kinds; and whether they are captured.
        self.plain_sizes: frozenset[int] = frozenset()
        self._is_without_candidates = self._is_timed = False

    def begin(self, state_index: int, as_chain: bool) -> None:
        """A request takes this row, from the next step on."""
        self._new[state_index] = as_chain

    def forget_earlier_owners(self) -> None:
        """What they drafted is not the new requests' own. One launch a table, however many requests came."""
        if not self._new:
            return
        new = async_tensor_h2d([*self._new.items()], dtype=torch.int64, device=self.as_chain.device)  # [new, 2]
        rows = new[:, 0]
        self.trees.is_node.index_fill_(0, rows, False)
        self.trees.depths.index_fill_(0, rows, 1)
        self.trees.probs.index_fill_(0, rows, 0.0)
        self.seen.num_said.index_fill_(0, rows, 0)
        self.as_chain[rows] = new[:, 1] != 0
        self._new.clear()

    def forget_what_follows_prompts(self, batch: InputBatch) -> None:
        """The target's tokens after a prompt, or a piece of one: what was drafted for its row was for another text."""
        if not batch.has_prefill:
            return
        rows = batch.idx_mapping_np[batch.is_prefilling_np]
        self.seen.num_said.index_fill_(0, async_tensor_h2d(rows, dtype=torch.int64, device=self.as_chain.device), 0)

    @contextmanager
    def without_candidates(self) -> Iterator[None]:
        """Steps begin that verify nothing, whatever is said of them."""
        self._is_without_candidates = True
        try:
            yield
        finally:
            self._is_without_candidates = False

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Steps begin that are made up, and yet are to take what real ones take: experts leave out padding."""
        self._is_timed = True
        try:
            yield
        finally:
            self._is_timed = False

    def is_plain(self, batch: InputBatch) -> bool:
        """Whether there is a graph without the trees' part for this step."""
        return not batch.num_draft_tokens and batch.num_tokens_after_padding in self.plain_sizes

    def begin_step(self, batch: InputBatch, is_whole: bool, is_capture: bool) -> None:
        """Say what the next forward verifies, and where its rows stand."""
        self.forget_earlier_owners()
        if self._is_timed:
            batch.is_padding.fill_(False)  # in the memory that graphs read
        write_verified_rows(
            self.rows,
            batch.positions,
            batch.idx_mapping,
            batch.query_start_loc,
            batch.cu_num_logits,
            batch.seq_lens,
            self.trees.depths,
            batch.num_reqs,
            batch.num_reqs_after_padding,
            batch.num_tokens_after_padding,
        )
        self.step = None
        if self._is_without_candidates or (is_whole and not is_capture and self.is_plain(batch)):
            return
        longest = batch.max_query_len or int(batch.num_scheduled_tokens.max())
        max_rows = min(longest, 1 + self.shape.num_nodes)  # a prompt may have more
        # A graph reads whatever is verified from the same memory. Of requests of one row each there is one too, which
        # verifies nothing; but where the number of rows varies, all of vLLM's own graphs are alike (`graphs.py`).
        if is_capture or is_whole:
            if max_rows > 1 or self.shape.is_auto:
                padded = (batch.num_reqs_after_padding, batch.num_tokens_after_padding)
                # The attention's schedule must be of the length that the graph was captured for.
                max_rows = 1 + self.shape.num_nodes if self.shape.is_auto else max_rows
                self.step = TreeStep(self.rows, *padded, max_rows, is_whole=True)
        elif batch.num_draft_tokens:
            self.step = TreeStep(self.rows, *verifying(batch), max_rows, is_whole=False)


def verifying(batch: InputBatch) -> tuple[int, int]:
    """How many requests lead a batch with candidates to verify, and how many rows these have.

    Their query lengths may be known to the device alone; these numbers are not.
    """
    assert batch.num_draft_tokens_per_req is not None
    num_reqs = int((batch.num_draft_tokens_per_req > 0).sum())
    planned = batch.num_scheduled_tokens[:num_reqs] - batch.num_draft_tokens_per_req[:num_reqs]
    assert (planned == 1).all(), f"requests with candidates lead a batch, with one more row each: {planned}"
    return num_reqs, num_reqs + int(batch.num_draft_tokens)
