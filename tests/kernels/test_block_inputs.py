# SPDX-License-Identifier: Apache-2.0
"""The kernel that prepares a step: literals by hand in sentinel-filled buffers, then any batch against plain loops."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dflash.kernels.block_inputs import (
    BlockInputBuffers,
    BlockTablePointers,
    reference_block_inputs,
    write_block_inputs,
)
from vllm_dflash.proposer.block_inputs import block_inputs, context_rows
from vllm_dflash.proposer.step import StepInputs

MASK, LIMIT = 99, 1000  # mask token id; a max_model_len out of reach
NOTHING = -1  # the slot that writes nothing
UNTOUCHED = -777


def sentinel_buffers(
    device: str, num_groups: int, max_num_reqs: int = 8, num_query_rows: int = 4, max_context_rows: int = 24
) -> BlockInputBuffers:
    buffers = BlockInputBuffers.allocate(max_num_reqs, num_query_rows, max_context_rows, num_groups, device)
    for field in fields(buffers):
        getattr(buffers, field.name).fill_(UNTOUCHED)
    return buffers


def make_inputs(
    device: str,
    positions: list[int],
    query_start_loc: list[int],
    seq_lens: list[int],
    num_rejected: list[int] | None,
    anchors: list[int],
    *tables: list[list[int]],
    block_sizes: tuple[int, ...] = (4,),
    **changes: Any,
) -> dict[str, Any]:
    """Arguments of `write_block_inputs`: 4 query rows a request, no padding, and every request has sampled its anchor.

    Requests sit in the runner's state in reverse order, with other tokens around and beside them.
    """

    def tensor(values: list[Any], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    num_reqs = len(seq_lens)
    state_index = [num_reqs - request for request in range(num_reqs)]  # row 0 is nobody's
    arguments = {
        "positions": tensor(positions, torch.int64),
        "query_start_loc": tensor(query_start_loc),
        "seq_lens": tensor(seq_lens),
        "num_rejected": None if num_rejected is None else tensor(num_rejected),
        "num_sampled": tensor([1] * num_reqs),
        "state_index": tensor(state_index, torch.int64),
        "last_sampled": tensor([[5000], *([anchor] for anchor in reversed(anchors)), [5001]], torch.int64),
        "next_prompt_token": tensor([6000, *(7000 + anchor for anchor in reversed(anchors)), 6001]),
        "block_tables": BlockTablePointers.of([tensor(table) for table in tables], block_sizes),
        "num_reqs": num_reqs,
        "num_rows": len(positions),
        "max_query_len": max((b - a for a, b in zip(query_start_loc, query_start_loc[1:], strict=False)), default=0),
        "num_reqs_padded": num_reqs,
        "num_context_rows_padded": len(positions),
        "num_query_rows": 4,
        "mask_token_id": MASK,
        "max_model_len": LIMIT,
    }
    for name, value in changes.items():
        arguments[name] = tensor(value) if isinstance(value, list) else value
    return arguments


def written(inputs: dict[str, Any], **sizes: int) -> BlockInputBuffers:
    """Buffers after one launch, which must not have written past the padded sizes."""
    tables = inputs["block_tables"]
    buffers = sentinel_buffers(tables.fields.device, len(tables.tensors), **sizes)
    write_block_inputs(buffers, **inputs)
    num_query = inputs["num_reqs_padded"] * inputs["num_query_rows"]
    num_context = inputs["num_context_rows_padded"]
    for name, end in {
        "context_positions": num_context,
        "context_slots": num_context,
        "input_ids": num_query,
        "positions": num_query,
        "query_slots": num_query,
        "query_start_loc": inputs["num_reqs_padded"] + 1,
        "seq_lens": inputs["num_reqs_padded"],
    }.items():
        values = getattr(buffers, name)
        assert (values[..., end:] == UNTOUCHED).all(), f"{name} is written past {end}"
        assert (values[..., :end] != UNTOUCHED).all(), f"{name} is not written up to {end}"
    return buffers


def context_slots(inputs: dict[str, Any]) -> list[list[int]]:
    return written(inputs).context_slots[:, : inputs["num_context_rows_padded"]].tolist()


def query_slots(buffers: BlockInputBuffers, num_rows: int = 4) -> list[list[int]]:
    return buffers.query_slots[:, :num_rows].tolist()


# One request, blocks of 4 slots: 5 prompt rows in blocks 7 and 3, the next block is 5.
PREFILL = ([0, 1, 2, 3, 4], [0, 5], [5], None, [42], [[7, 3, 5]])
# The same request later: its anchor and 3 drafts ran at 6..9, and the last two drafts were rejected.
DECODE = ([6, 7, 8, 9], [0, 4], [10], [2], [42], [[7, 3, 5]])


def test_prefill_writes_every_prompt_row(device: str) -> None:
    buffers = written(make_inputs(device, *PREFILL))
    assert buffers.context_positions[:5].tolist() == [0, 1, 2, 3, 4]
    assert buffers.context_slots[:, :5].tolist() == [[28, 29, 30, 31, 12]]  # 7*4 + 0..3, 3*4 + 0


def test_block_follows_the_prompt(device: str) -> None:
    buffers = written(make_inputs(device, *PREFILL))
    assert buffers.input_ids[:4].tolist() == [42, MASK, MASK, MASK]
    assert buffers.positions[:4].tolist() == [5, 6, 7, 8]
    assert query_slots(buffers) == [[13, 14, 15, 20]]  # 3*4 + 1..3, 5*4 + 0
    assert buffers.query_start_loc[:2].tolist() == [0, 4]
    assert buffers.seq_lens[:1].tolist() == [9]


def test_rejected_rows_write_nothing_and_the_block_overtakes_them(device: str) -> None:
    buffers = written(make_inputs(device, *DECODE))
    assert buffers.context_positions[:4].tolist() == [6, 7, 8, 9]
    assert buffers.context_slots[:, :4].tolist() == [[14, 15, NOTHING, NOTHING]]  # 3*4 + 2..3
    assert buffers.positions[:4].tolist() == [8, 9, 10, 11]
    assert query_slots(buffers) == [[20, 21, 22, 23]]
    assert buffers.seq_lens[:1].tolist() == [12]


def test_no_rejections_and_unknown_rejections_are_the_same(device: str) -> None:
    counted = make_inputs(device, [0, 1, 2, 3, 4], [0, 5], [5], [0], [42], [[7, 3, 5]])
    assert context_slots(counted) == context_slots(make_inputs(device, *PREFILL)) == [[28, 29, 30, 31, 12]]


def test_requests_of_a_mixed_batch_keep_to_their_own(device: str) -> None:
    """A chunk of A's prompt (rows 4..6, next prompt token 7011) beside B's decode (rows 5..7, the last rejected)."""
    tables = [[2, 4, 0], [6, 1, 9]]
    batch = ([4, 5, 6, 5, 6, 7], [0, 3, 6], [7, 8], [0, 1], [11, 12], tables)
    inputs = make_inputs(device, *batch, num_sampled=[0, 1], num_query_rows=3)
    buffers = written(inputs)
    assert buffers.context_slots[:, :6].tolist() == [[16, 17, 18, 5, 6, NOTHING]]  # A: 4*4 + 0..2; B: 1*4 + 1..2
    assert buffers.input_ids[:6].tolist() == [7011, MASK, MASK, 12, MASK, MASK]
    assert buffers.positions[:6].tolist() == [7, 8, 9, 7, 8, 9]
    # A: 4*4 + 3, then a block it has not got; B: 1*4 + 3, 9*4 + 0..1
    assert query_slots(buffers, 6) == [[19, NOTHING, NOTHING, 7, 36, 37]]
    assert buffers.query_start_loc[:3].tolist() == [0, 3, 6]
    assert buffers.seq_lens[:2].tolist() == [10, 10]


def test_rejections_of_one_request_do_not_shift_the_next(device: str) -> None:
    inputs = make_inputs(device, [3, 4, 5, 3, 4, 5], [0, 3, 6], [6, 6], [2, 0], [1, 2], [[1, 2, 8], [3, 4, 9]])
    assert context_slots(inputs) == [[7, NOTHING, NOTHING, 15, 16, 17]]
    assert written(inputs).positions[:8].tolist() == [4, 5, 6, 7, 6, 7, 8, 9]


def test_anchor_of_a_sampled_request_is_its_last_token_and_of_a_mid_prefill_one_its_next_prompt_token(
    device: str,
) -> None:
    tables = [[1, 2], [3, 4], [5, 6]]
    batch = ([0, 0, 0], [0, 1, 2, 3], [1, 1, 1], None, [11, 12, 13], tables)
    inputs = make_inputs(device, *batch, num_sampled=[1, 0, 3], num_query_rows=1)
    assert written(inputs).input_ids[:3].tolist() == [11, 7012, 13]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_state_may_be_flat_and_of_either_integer_type(device: str, index_dtype: torch.dtype) -> None:
    inputs = make_inputs(device, *DECODE)
    inputs["last_sampled"] = inputs["last_sampled"].flatten()
    inputs["next_prompt_token"] = inputs["next_prompt_token"].to(torch.int64)
    inputs["state_index"] = inputs["state_index"].to(index_dtype)
    assert written(inputs).input_ids[:4].tolist() == [42, MASK, MASK, MASK]
    inputs["num_sampled"].zero_()
    assert written(inputs).input_ids[:4].tolist() == [7042, MASK, MASK, MASK]


def test_null_block_is_never_written(device: str) -> None:
    """Every request sees physical block 0; an unallocated entry of a table points there."""
    inputs = make_inputs(device, [0, 1, 4], [0, 3], [5], None, [42], [[0, 0, 0]])
    assert context_slots(inputs) == [[NOTHING] * 3]
    assert query_slots(written(inputs)) == [[NOTHING] * 4]


def test_rows_past_the_table_write_nothing(device: str) -> None:
    """They must not wrap into a neighbour's row of the table either."""
    inputs = make_inputs(device, [6, 7, 8, 6, 7, 8], [0, 3, 6], [9, 9], None, [1, 2], [[1, 2], [3, 4]])
    assert context_slots(inputs) == [[10, 11, NOTHING, 18, 19, NOTHING]]  # 2*4 + 2..3; 4*4 + 2..3
    assert query_slots(written(inputs), 8) == [[NOTHING] * 8]


def test_rows_past_max_model_len_write_nothing_and_stay_in_range(device: str) -> None:
    inputs = make_inputs(device, [9, 2], [0, 1, 2], [9, 3], [1, 0], [1, 2], [[1, 2, 3], [4, 5, 6]], max_model_len=10)
    buffers = written(inputs)
    assert buffers.positions[:8].tolist() == [8, 9, 9, 9, 3, 4, 5, 6]
    assert query_slots(buffers, 8) == [[12, 13, NOTHING, NOTHING, 19, 20, 21, 22]]  # 3*4 + 0..1; 4*4 + 3, 5*4 + 0..2
    assert buffers.seq_lens[:2].tolist() == [10, 7]


def test_block_wholly_past_max_model_len(device: str) -> None:
    buffers = written(make_inputs(device, [9], [0, 1], [10], None, [1], [[1, 2, 3]], max_model_len=10))
    assert buffers.positions[:4].tolist() == [9, 9, 9, 9]
    assert query_slots(buffers) == [[NOTHING] * 4]
    assert buffers.seq_lens[:1].tolist() == [10]


def test_groups_have_their_own_block_size_and_table(device: str) -> None:
    inputs = make_inputs(
        device,
        *([4, 5], [0, 2], [6], [1], [42], [[1, 2, 3]], [[5, 6, 7, 8, 9]]),
        block_sizes=(4, 2),
        num_query_rows=3,
    )
    buffers = written(inputs)
    assert buffers.context_slots[:, :2].tolist() == [[8, NOTHING], [14, NOTHING]]  # 2*4 + 0; 7*2 + 0
    assert buffers.positions[:3].tolist() == [5, 6, 7]
    assert query_slots(buffers, 3) == [[9, 10, 11], [15, 16, 17]]  # 2*4 + 1..3; 7*2 + 1, 8*2 + 0..1


def test_tables_that_are_slices_of_wider_ones(device: str) -> None:
    wide = torch.tensor([[1, 2, 8, 9], [3, 4, 8, 9]], dtype=torch.int32, device=device)
    inputs = make_inputs(device, [0, 5, 9], [0, 1, 3], [1, 10], None, [1, 2], [[0]])
    inputs["block_tables"] = BlockTablePointers.of([wide[:, :2]], [4])
    assert context_slots(inputs) == [[4, 17, NOTHING]]  # 1*4 + 0; 4*4 + 1; column 2 is not the table's


def test_padding_requests_are_empty(device: str) -> None:
    inputs = make_inputs(device, *DECODE, num_reqs_padded=4)
    buffers = written(inputs)
    assert buffers.query_start_loc[:5].tolist() == [0, 4, 4, 4, 4]
    assert buffers.seq_lens[:4].tolist() == [12, 0, 0, 0]
    assert buffers.input_ids[:16].tolist() == [42] + [MASK] * 15
    assert buffers.positions[:16].tolist() == [8, 9, 10, 11] + [0] * 12
    assert query_slots(buffers, 16) == [[20, 21, 22, 23] + [NOTHING] * 12]


def test_padding_context_rows_write_nothing(device: str) -> None:
    buffers = written(make_inputs(device, *DECODE, num_context_rows_padded=9, num_reqs_padded=2))
    assert buffers.context_positions[:9].tolist() == [6, 7, 8, 9, 0, 0, 0, 0, 0]
    assert buffers.context_slots[:, :9].tolist() == [[14, 15] + [NOTHING] * 7]


def test_rows_padded_by_the_runner_write_nothing(device: str) -> None:
    """Rows behind the last request's end, but among the T rows: nobody's, whatever their position."""
    for num_rejected in (None, [0]):
        batch = ([4, 5, 1, 2, 3], [0, 2], [6], num_rejected, [42], [[7, 3, 1]])
        buffers = written(make_inputs(device, *batch, num_context_rows_padded=7))
        assert buffers.context_positions[:7].tolist() == [4, 5, 1, 2, 3, 0, 0]
        assert buffers.context_slots[:, :7].tolist() == [[12, 13] + [NOTHING] * 5]


def test_runner_arrays_may_be_longer_than_the_batch(device: str) -> None:
    """What lies past R and T is of an earlier step."""
    batch = ([6, 7, 8, 9, 3, 3], [0, 4, 2, 1], [10, 500], [2, 1], [42, 43], [[7, 3, 5], [8, 8, 8]])
    inputs = make_inputs(device, *batch) | {
        "num_reqs": 1,
        "num_rows": 4,
        "num_reqs_padded": 2,
        "num_context_rows_padded": 6,
    }
    buffers = written(inputs)
    assert buffers.context_positions[:6].tolist() == [6, 7, 8, 9, 0, 0]
    assert buffers.context_slots[:, :6].tolist() == [[14, 15] + [NOTHING] * 4]
    assert buffers.input_ids[:8].tolist() == [42] + [MASK] * 7
    assert buffers.seq_lens[:2].tolist() == [12, 0]
    assert buffers.query_start_loc[:3].tolist() == [0, 4, 4]


def test_a_batch_of_padding_only(device: str) -> None:
    inputs = make_inputs(device, [], [0], [], None, [], [[7, 3]], num_reqs_padded=2, num_context_rows_padded=3)
    for name in ("seq_lens", "num_sampled", "state_index"):  # no tensor of the runner is ever empty
        inputs[name] = torch.full((1,), 500, dtype=torch.int32, device=device)
    inputs["positions"] = torch.full((4,), 5, dtype=torch.int64, device=device)
    buffers = written(inputs)
    assert buffers.query_start_loc[:3].tolist() == [0, 0, 0]
    assert buffers.seq_lens[:2].tolist() == [0, 0]
    assert buffers.context_positions[:3].tolist() == [0, 0, 0]
    assert buffers.context_slots[:, :3].tolist() == [[NOTHING] * 3]
    assert query_slots(buffers, 8) == [[NOTHING] * 8]


def test_request_without_rows_of_its_own(device: str) -> None:
    inputs = make_inputs(device, [6, 2], [0, 1, 1, 2], [7, 5, 3], None, [1, 2, 3], [[1, 2], [3, 4], [5, 6]])
    buffers = written(inputs)
    assert buffers.context_slots[:, :2].tolist() == [[10, 22]]  # 2*4 + 2, 5*4 + 2
    assert buffers.positions[:12].tolist() == [7, 8, 9, 10, 5, 6, 7, 8, 3, 4, 5, 6]


@pytest.mark.parametrize("max_query_len", [1, 1100])
def test_long_prefill_is_shared_by_programs_and_none_of_its_rows_is_left_out(device: str, max_query_len: int) -> None:
    """1100 rows do not fit one program. A bound that is too small costs time, not rows."""
    positions = list(range(3, 1103))
    table = list(range(1, 301))
    inputs = make_inputs(
        device, [0, *positions], [0, 1, 1101], [1, 1103], [0, 5], [1, 2], [[900] * 300, table], max_model_len=1200
    )
    inputs |= {"max_query_len": max_query_len, "num_context_rows_padded": 1700}
    buffers = written(inputs, max_context_rows=2000)
    # Blocks lie one behind the other from 1 on, so a slot is the position plus one block.
    accepted = [position + 4 for position in positions[:-5]]
    assert buffers.context_slots[0, :1700].tolist() == [3600, *accepted] + [NOTHING] * (5 + 599)
    assert buffers.context_positions[:1700].tolist() == [0, *positions] + [0] * 599


def test_more_query_rows_than_one_program_takes_at_a_time(device: str) -> None:
    inputs = make_inputs(device, [2], [0, 1], [3], None, [42], [list(range(1, 101))], num_query_rows=300)
    buffers = written(inputs, num_query_rows=300, max_num_reqs=2)
    assert buffers.positions[:300].tolist() == list(range(3, 303))
    assert query_slots(buffers, 300) == [list(range(7, 307))]
    assert buffers.input_ids[:300].tolist() == [42] + [MASK] * 299


def test_slots_do_not_overflow(device: str) -> None:
    """Block 2^30 of 16 slots, and positions past 2^31: the arithmetic is in 64 bits throughout."""
    inputs = make_inputs(device, [5, 2**33], [0, 2], [6], None, [42], [[2**30]], block_sizes=(16,))
    buffers = written(inputs)
    assert buffers.context_slots[:, :2].tolist() == [[2**34 + 5, NOTHING]]
    assert buffers.context_positions[:2].tolist() == [5, 2**33]
    assert query_slots(buffers) == [[2**34 + 6, 2**34 + 7, 2**34 + 8, 2**34 + 9]]
    huge = make_inputs(device, [2**33 + 1], [0, 1], [6], None, [42], [[3, 4, 5]], block_sizes=(2**32,))
    assert context_slots(huge) == [[5 * 2**32 + 1]]


def test_inputs_are_left_as_they_were(device: str) -> None:
    """The runner's tensors are used again by the next step."""
    inputs = make_inputs(device, *DECODE, num_reqs_padded=3, num_context_rows_padded=8)
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    written(inputs)
    for name, value in before.items():
        assert torch.equal(inputs[name], value), name


def test_buffers_that_are_too_small_are_an_error(device: str) -> None:
    for change in ({"num_reqs_padded": 9}, {"num_context_rows_padded": 25}, {"num_query_rows": 40}):
        with pytest.raises(AssertionError):
            write_block_inputs(sentinel_buffers(device, 1), **make_inputs(device, *DECODE) | change)
    with pytest.raises(AssertionError):
        write_block_inputs(sentinel_buffers(device, 2), **make_inputs(device, *DECODE))


# Any batch, against loops.


@dataclass
class Request:
    before: int  # context rows in the cache before this step
    rows: int  # target rows of this step
    rejected: int
    num_sampled: int
    anchor: int
    tables: list[list[int]]  # one row of each group's table; 0 where nothing is allocated


@dataclass
class Batch:
    requests: list[Request]
    runner_padding: int  # rows past the last request's
    padding: tuple[int, int]  # requests, context rows
    block_sizes: tuple[int, ...]
    num_query_rows: int
    max_model_len: int
    knows_rejections: bool


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    block_sizes = tuple(draw(st.lists(st.sampled_from([1, 2, 4, 16]), min_size=1, max_size=3)))
    max_model_len = draw(st.integers(4, 40))
    knows_rejections = draw(st.booleans())
    requests = []
    for _ in range(draw(st.integers(1, 4))):
        rows = draw(st.integers(0, min(6, max_model_len)))
        requests.append(
            Request(
                before=draw(st.integers(0 if rows else 1, max_model_len - rows)),
                rows=rows,
                rejected=draw(st.integers(0, max(rows - 1, 0))) if knows_rejections else 0,
                num_sampled=draw(st.integers(0, 2)),
                anchor=draw(st.integers(0, 90)),
                # One column less than needed, at times: rows past the table.
                tables=[
                    draw(st.lists(st.integers(0, 60), min_size=width, max_size=width))
                    for width in (max(max_model_len // size, 1) for size in block_sizes)
                ],
            )
        )
    return Batch(
        requests=requests,
        runner_padding=draw(st.integers(0, 3)),
        padding=draw(st.tuples(st.integers(0, 3), st.integers(0, 5))),
        block_sizes=block_sizes,
        num_query_rows=draw(st.integers(1, 9)),
        max_model_len=max_model_len,
        knows_rejections=knows_rejections,
    )


def inputs_of(batch: Batch, device: str) -> dict[str, Any]:
    positions, starts = [], [0]
    for request in batch.requests:
        positions += range(request.before, request.before + request.rows)
        starts.append(len(positions))
    positions += [1] * batch.runner_padding
    return make_inputs(
        device,
        positions or [0],
        starts,
        [request.before + request.rows for request in batch.requests],
        [request.rejected for request in batch.requests] if batch.knows_rejections else None,
        [request.anchor for request in batch.requests],
        *([request.tables[group] for request in batch.requests] for group in range(len(batch.block_sizes))),
        block_sizes=batch.block_sizes,
        num_sampled=[request.num_sampled for request in batch.requests],
        num_reqs_padded=len(batch.requests) + batch.padding[0],
        num_context_rows_padded=max(len(positions), 1) + batch.padding[1],
        num_query_rows=batch.num_query_rows,
        max_model_len=batch.max_model_len,
    )


SIZES = {"max_num_reqs": 8, "num_query_rows": 9, "max_context_rows": 40}


@settings(deadline=None, max_examples=150)
@given(batches())
def test_any_batch_is_as_in_plain_loops(device: str, batch: Batch) -> None:
    inputs = inputs_of(batch, device)
    expected = sentinel_buffers(device, len(batch.block_sizes), **SIZES)
    reference_block_inputs(expected, **inputs)
    actual = written(inputs, **SIZES)
    for field in fields(BlockInputBuffers):
        assert getattr(actual, field.name).tolist() == getattr(expected, field.name).tolist(), field.name


@settings(deadline=None, max_examples=80)
@given(batches())
def test_any_batch_is_as_in_the_torch_version(device: str, batch: Batch) -> None:
    inputs = inputs_of(batch, device)
    anchors = [request.anchor + (0 if request.num_sampled else 7000) for request in batch.requests]
    step = StepInputs(
        features=torch.empty(inputs["num_rows"], 0, device=device),
        positions=inputs["positions"],
        query_start_loc=inputs["query_start_loc"],
        seq_lens=inputs["seq_lens"],
        num_rejected=inputs["num_rejected"],
        anchors=torch.tensor(anchors, dtype=torch.int32, device=device),
        block_tables=inputs["block_tables"].tensors,
        max_seq_len=batch.max_model_len,
    )
    rows = context_rows(step, batch.block_sizes)
    block = block_inputs(step, batch.block_sizes, batch.num_query_rows - 1, MASK, batch.max_model_len)
    num_reqs, num_query = len(anchors), len(anchors) * batch.num_query_rows
    actual = written(inputs, **SIZES)
    assert actual.context_slots[:, : inputs["num_rows"]].tolist() == [slots.tolist() for slots in rows.slot_mappings]
    assert actual.query_slots[:, :num_query].tolist() == [slots.tolist() for slots in block.slot_mappings]
    assert actual.input_ids[:num_query].tolist() == block.input_ids.tolist()
    assert actual.positions[:num_query].tolist() == block.positions.tolist()
    assert actual.query_start_loc[: num_reqs + 1].tolist() == block.query_start_loc.tolist()
    assert actual.seq_lens[:num_reqs].tolist() == block.seq_lens.tolist()
