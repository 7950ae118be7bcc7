# SPDX-License-Identifier: Apache-2.0
"""Row arithmetic of a step: slots of the context rows, and the query rows of the blocks.

All on the device without a host sync: how many rows were rejected is only known there.
"""

from __future__ import annotations

import torch

from vllm_dflash.proposer.step import PADDING_SLOT, AnchorSource, BlockInputs, ContextRows, StepInputs

#: Physical block 0 is vLLM's null block: what is written there is seen by every request.
NULL_BLOCK = 0


def slots_of(
    block_table: torch.Tensor,  # [R, blocks per request]
    requests: torch.Tensor,  # [...] request of each row
    positions: torch.Tensor,  # [...]
    block_size: int,
    keep: torch.Tensor,  # bool [...]
) -> torch.Tensor:
    """Cache slot of every row: block number * block size + offset.

    Rows not kept, outside the table, or in the null block get padding slots.
    """
    columns, width = positions // block_size, block_table.shape[1]
    blocks = block_table[requests, columns.clamp(max=width - 1)].long()
    slots = blocks * block_size + positions % block_size
    return torch.where(keep & (columns < width) & (blocks != NULL_BLOCK), slots, PADDING_SLOT)


def context_rows(step: StepInputs, block_sizes: tuple[int, ...]) -> ContextRows:
    """Slots of the T target rows; rejected rows write nothing.

    Example: one request ran rows at positions 7, 8, 9 (anchor and two drafts) and the last draft was rejected: rows 7
    and 8 get their slots, row 9 the padding slot. Row 9's position is computed anew by a later step.
    """
    ends = step.query_start_loc[1:]
    rows = torch.arange(step.positions.shape[0], device=ends.device)
    # A runner may pad its rows past the last request's: they count as that request's, behind its end.
    requests = torch.searchsorted(ends, rows, right=True).clamp(max=ends.shape[0] - 1)
    valid_ends = ends if step.num_rejected is None else ends - step.num_rejected
    valid = rows < valid_ends[requests]
    slot_mappings = [
        slots_of(table, requests, step.positions, size, valid)
        for table, size in zip(step.block_tables, block_sizes, strict=True)
    ]
    return ContextRows(step.positions, torch.stack(slot_mappings))


def block_inputs(
    step: StepInputs,
    block_sizes: tuple[int, ...],
    num_speculative_tokens: int,
    mask_token_id: int,
    max_model_len: int,
) -> BlockInputs:
    """The query rows of every request: the anchor and K masks, right behind the accepted context.

    Rows at or past `max_model_len` could never be accepted: they write nothing and repeat the last position, so that
    no table is read past its end.
    """
    num_query_rows = 1 + num_speculative_tokens
    anchors = step.anchors.gather() if isinstance(step.anchors, AnchorSource) else step.anchors
    requests = torch.arange(anchors.shape[0] + 1, dtype=torch.int32, device=anchors.device)
    context_lens = step.seq_lens if step.num_rejected is None else step.seq_lens - step.num_rejected
    offsets = torch.arange(num_query_rows, device=anchors.device)
    positions = context_lens[:, None] + offsets  # [R, Q]
    fits = positions < max_model_len
    positions = positions.clamp(max=max_model_len - 1)
    slot_mappings = tuple(
        slots_of(table, requests[:-1, None], positions, size, fits).flatten()
        for table, size in zip(step.block_tables, block_sizes, strict=True)
    )
    input_ids = torch.full_like(positions, mask_token_id, dtype=torch.int32)
    input_ids[:, 0] = anchors
    return BlockInputs(
        input_ids=input_ids.flatten(),
        positions=positions.flatten(),
        slot_mappings=slot_mappings,
        query_start_loc=requests * num_query_rows,
        seq_lens=(context_lens + num_query_rows).clamp(max=max_model_len).to(torch.int32),
        num_query_rows=num_query_rows,
        block_tables=step.block_tables,
        max_seq_len=min(step.max_seq_len + num_query_rows, max_model_len),
        seq_lens_upper_bound=_grown(step.seq_lens_upper_bound, num_query_rows, max_model_len),
    )


def _grown(
    bound: torch.Tensor | None,  # [R]
    extra: int,
    limit: int,
) -> torch.Tensor | None:
    return None if bound is None else (bound + extra).clamp(max=limit)
