# SPDX-License-Identifier: Apache-2.0
"""A step's rows in memory that stays where it is, so that a CUDA graph finds them at every replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_dflash.kernels.block_inputs import BlockInputBuffers, BlockTablePointers, write_block_inputs
from vllm_dflash.proposer.step import PADDING_SLOT, AnchorSource, BlockInputs, ContextRows, StepInputs


@dataclass(frozen=True)
class StagingLimits:
    """The largest step there can be."""

    max_num_reqs: int
    num_query_rows: int  # Q
    max_context_rows: int  # of one step
    max_model_len: int


class StagedStep:
    """Rows of one step, written by one kernel launch and read through views: `context_rows`, `block`.

    Padding requests and rows follow the real ones: they have padding slots and no keys to attend to.
    """

    def __init__(
        self,
        limits: StagingLimits,
        block_tables: Sequence[torch.Tensor],  # G tensors [max_num_reqs, blocks per request], at fixed addresses
        block_sizes: Sequence[int],  # G entries
        mask_token_id: int,
        device: torch.device,
    ) -> None:
        self.limits, self.mask_token_id = limits, mask_token_id
        self.block_tables = tuple(block_tables)
        self._pointers = BlockTablePointers.of(list(block_tables), list(block_sizes))
        self.buffers = BlockInputBuffers.allocate(
            limits.max_num_reqs, limits.num_query_rows, limits.max_context_rows, len(block_sizes), device
        )

    def write(self, step: StepInputs, max_query_len: int, num_reqs_padded: int, num_context_rows_padded: int) -> None:
        """Fill the buffers for a step of R <= `num_reqs_padded` requests and T <= `num_context_rows_padded` rows.

        `max_query_len` is the longest request's share of the T rows.
        """
        anchors = step.anchors
        assert isinstance(anchors, AnchorSource) and step.num_rejected is not None
        write_block_inputs(
            self.buffers,
            positions=step.positions,
            query_start_loc=step.query_start_loc,
            seq_lens=step.seq_lens,
            num_rejected=step.num_rejected,
            num_sampled=anchors.num_sampled,
            state_index=anchors.state_index,
            last_sampled=anchors.last_sampled,
            next_prompt_token=anchors.next_prompt_token,
            block_tables=self._pointers,
            num_reqs=anchors.state_index.shape[0],
            num_rows=step.positions.shape[0],
            max_query_len=max_query_len,
            num_reqs_padded=num_reqs_padded,
            num_context_rows_padded=num_context_rows_padded,
            num_query_rows=self.limits.num_query_rows,
            mask_token_id=self.mask_token_id,
            max_model_len=self.limits.max_model_len,
        )

    def write_nothing(self) -> None:
        """Give every row a padding slot: made-up steps must not touch a cache."""
        self.buffers.context_slots.fill_(PADDING_SLOT)
        self.buffers.query_slots.fill_(PADDING_SLOT)

    def write_idle(self) -> None:
        """The rows of a full batch that has no context, for graph capture: each request sees its own block."""
        num_query_rows = self.limits.num_query_rows
        starts = torch.arange(self.limits.max_num_reqs + 1, device=self.buffers.query_start_loc.device)
        self.buffers.query_start_loc.copy_(starts * num_query_rows)
        self.buffers.seq_lens.fill_(num_query_rows)
        self.write_nothing()

    def context_rows(self, start: int, end: int) -> ContextRows:
        """Context rows start..end-1."""
        return ContextRows(self.buffers.context_positions[start:end], self.buffers.context_slots[:, start:end])

    def block(
        self,
        num_reqs: int,
        max_seq_len: int,
        seq_lens_upper_bound: torch.Tensor | None = None,  # [R] on the host, own block included
    ) -> BlockInputs:
        """The query rows of the first `num_reqs` requests, padding ones included."""
        num_rows = num_reqs * self.limits.num_query_rows
        buffers = self.buffers
        return BlockInputs(
            input_ids=buffers.input_ids[:num_rows],
            positions=buffers.positions[:num_rows],
            slot_mappings=tuple(buffers.query_slots[:, :num_rows]),
            query_start_loc=buffers.query_start_loc[: num_reqs + 1],
            seq_lens=buffers.seq_lens[:num_reqs],
            num_query_rows=self.limits.num_query_rows,
            block_tables=tuple(table[:num_reqs] for table in self.block_tables),
            max_seq_len=max_seq_len,
            seq_lens_upper_bound=seq_lens_upper_bound,
        )
