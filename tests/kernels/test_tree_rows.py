# SPDX-License-Identifier: Apache-2.0
"""Row arithmetic of steps that verify trees, worked out by hand on one tree.

root -+- 10
      +- 11 -+- 20
             +- 21 --- 30
"""

from __future__ import annotations

import torch

from vllm_dflash.kernels.tree_rows import (
    AcceptedRows,
    VerifiedRows,
    write_accepted_rows,
    write_verified_rows,
)

DEPTHS = [1, 1, 2, 2, 3]
#: Three requests: a verification of the whole tree, one of its first two nodes, a prompt's end of three rows.
STATE_ROWS, ROWS, NUM_LOGITS, SEQ_LENS = [2, 1, 0], [6, 3, 3], [6, 3, 1], [16, 23, 3]
SLOT_POSITIONS = [10, 11, 12, 13, 14, 15, 20, 21, 22, 0, 1, 2]
NOT_WRITTEN = -9


def starts(counts: list[int], device: str) -> torch.Tensor:
    return torch.tensor([0, *counts], device=device).cumsum(0).int()


def ints(values: list, device: str, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def depths(device: str) -> torch.Tensor:
    return ints([[NOT_WRITTEN] * 5, DEPTHS, DEPTHS], device)


def verified_rows(device: str, num_reqs_padded: int = 5, num_rows: int = 14) -> VerifiedRows:
    out = VerifiedRows.allocate(num_reqs_padded + 1, num_rows + 1, torch.device(device))
    for column in vars(out).values():
        column.fill_(NOT_WRITTEN)
    query_start_loc = torch.cat((starts(ROWS, device), ints([12, 12], device)))
    write_verified_rows(
        out,
        ints([*SLOT_POSITIONS, 7, 8], device, torch.int64),  # two rows of padding
        ints(STATE_ROWS, device, torch.int64),
        query_start_loc,
        starts(NUM_LOGITS, device),
        ints([*SEQ_LENS, 0, 0], device),
        depths(device),
        num_reqs=3,
        num_reqs_padded=num_reqs_padded,
        num_rows=num_rows,
    )
    return out


def test_what_a_step_verifies(device: str) -> None:
    out = verified_rows(device)
    assert out.state_rows.tolist() == [2, 1, 0, 0, 0, NOT_WRITTEN]
    assert out.first_rows.tolist() == [0, 6, 11, 0, 0, NOT_WRITTEN]
    assert out.num_rows.tolist() == [6, 3, 0, 0, 0, NOT_WRITTEN]
    assert out.prefix_lens.tolist() == [10, 20, 3, 0, 0, NOT_WRITTEN]


def test_candidates_stand_at_their_depths(device: str) -> None:
    expected = [10, 11, 11, 12, 12, 13, 20, 21, 21, 0, 1, 2, 7, 8, NOT_WRITTEN]
    assert verified_rows(device).positions.tolist() == expected


def accepted_rows(device: str, num_sampled: list[int], num_rejected: list[int]) -> AcceptedRows:
    out = AcceptedRows.allocate(4, 16, torch.device(device))
    for column in vars(out).values():
        column.fill_(NOT_WRITTEN)
    write_accepted_rows(
        out,
        ints([[0, 0, 0], [2, NOT_WRITTEN, 0], [2, 4, NOT_WRITTEN]], device),  # ways by row of the state
        ints(STATE_ROWS, device, torch.int64),
        ints(SLOT_POSITIONS, device, torch.int64),
        starts(ROWS, device),
        starts(NUM_LOGITS, device),
        ints(SEQ_LENS, device),
        ints(num_sampled, device),
        ints(num_rejected, device),
        num_reqs=3,
        num_verifying=2,
        longest=3,
    )
    return out


def test_accepted_rows_become_consecutive(device: str) -> None:
    """Accepted are 11 and 21 of the first tree, rows 2 and 4, and 11 of the second, whose root is row 6."""
    out = accepted_rows(device, num_sampled=[3, 2, 1], num_rejected=[3, 1, 0])
    assert out.query_start_loc.tolist() == [0, 4, 8, 11, NOT_WRITTEN]
    assert out.rows.tolist()[:3] + out.rows.tolist()[4:6] + out.rows.tolist()[8:11] == [0, 2, 4, 6, 8, 9, 10, 11]
    assert out.positions.tolist() == [10, 11, 12, 13, 20, 21, 22, 23, 0, 1, 2] + [NOT_WRITTEN] * 5
    assert out.num_rejected.tolist() == [1, 2, 0, NOT_WRITTEN]
    assert out.seq_lens.tolist() == [14, 24, 3, NOT_WRITTEN]
    # Padding is read too, so it must be rows that there are.
    assert {out.rows[3].item(), *out.rows[6:8].tolist()} <= set(range(12))


def test_what_is_sampled_in_mid_prefill_does_not_count(device: str) -> None:
    """A root that is still prompt: nothing behind it is kept."""
    out = accepted_rows(device, num_sampled=[0, 2, 0], num_rejected=[5, 1, 0])
    assert out.num_rejected.tolist() == [3, 2, 0, NOT_WRITTEN]


def test_long_prompts_behind_verifications(device: str) -> None:
    """Rows of others are copied by several programs."""
    rows = [3, 600]
    out = AcceptedRows.allocate(2, 700, torch.device(device))
    write_accepted_rows(
        out,
        ints([[1, 0, 0], [0, 0, 0]], device),
        ints([0, 1], device),
        ints([*range(40, 43), *range(100, 700)], device, torch.int64),
        starts(rows, device),
        starts([3, 1], device),
        ints([43, 700], device),
        ints([2, 1], device),
        ints([1, 0], device),
        num_reqs=2,
        num_verifying=1,
        longest=600,
    )
    assert out.rows[4:604].tolist() == list(range(3, 603))
    assert out.positions[4:604].tolist() == list(range(100, 700))
    assert out.query_start_loc.tolist() == [0, 4, 604]


def test_where_rows_are_whose_by_many_requests(device: str) -> None:
    """Copies find a row's request by bisection."""
    num_reqs, rows_each = 37, 9
    positions = torch.arange(num_reqs * rows_each, device=device)
    out = VerifiedRows.allocate(num_reqs, len(positions), torch.device(device))
    tree = ints([[1, 1, 2, 2, 3]] * num_reqs, device)
    write_verified_rows(
        out,
        positions,
        torch.arange(num_reqs, device=device),
        starts([rows_each] * num_reqs, device),
        starts([6] * num_reqs, device),  # three rows of prompt before each root
        ints([rows_each * (index + 1) for index in range(num_reqs)], device),
        tree,
        num_reqs,
        num_reqs,
        len(positions),
    )
    expected = [first + offset for first in range(0, len(positions), 9) for offset in (0, 1, 2, 3, 4, 4, 5, 5, 6)]
    assert out.positions.tolist() == expected
