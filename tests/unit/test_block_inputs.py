# SPDX-License-Identifier: Apache-2.0
"""Which rows are written where, and what the block's rows are: literals by hand, then any batch against plain loops."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dflash.proposer.block_inputs import block_inputs, context_rows
from vllm_dflash.proposer.step import AnchorSource, BlockInputs, StepInputs

MASK, LIMIT = 99, 1000  # mask token id; a max_model_len out of reach
NOTHING = -1  # the slot that writes nothing


def make_step(
    positions: list[int],
    query_start_loc: list[int],
    seq_lens: list[int],
    num_rejected: list[int] | None,
    anchors: list[int],
    *tables: list[list[int]],
    upper_bound: list[int] | None = None,
) -> StepInputs:
    """A step in the dtypes of vLLM's runner. The features play no part here."""
    return StepInputs(
        features=torch.empty(len(positions), 0),
        positions=torch.tensor(positions, dtype=torch.int64),
        query_start_loc=torch.tensor(query_start_loc, dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_rejected=None if num_rejected is None else torch.tensor(num_rejected, dtype=torch.int32),
        anchors=torch.tensor(anchors, dtype=torch.int32),
        block_tables=tuple(torch.tensor(table, dtype=torch.int32) for table in tables),
        max_seq_len=max(seq_lens),
        seq_lens_upper_bound=None if upper_bound is None else torch.tensor(upper_bound, dtype=torch.int32),
    )


def context_slots(step: StepInputs, *block_sizes: int) -> list[list[int]]:
    rows = context_rows(step, block_sizes)
    assert rows.positions is step.positions
    return [slots.tolist() for slots in rows.slot_mappings]


def block_slots(block: BlockInputs) -> list[list[int]]:
    return [slots.tolist() for slots in block.slot_mappings]


# One request, blocks of 4 slots: 5 prompt rows in blocks 7 and 3, the next block is 5.
PREFILL = make_step([0, 1, 2, 3, 4], [0, 5], [5], None, [42], [[7, 3, 5]])
# The same request later: its anchor and 3 drafts ran at 6..9, and the last two drafts were rejected.
DECODE = make_step([6, 7, 8, 9], [0, 4], [10], [2], [42], [[7, 3, 5]])


def test_prefill_writes_every_prompt_row() -> None:
    assert context_slots(PREFILL, 4) == [[28, 29, 30, 31, 12]]  # 7*4 + 0..3, 3*4 + 0


def test_block_follows_the_prompt() -> None:
    block = block_inputs(PREFILL, (4,), 3, MASK, LIMIT)
    assert block.input_ids.tolist() == [42, MASK, MASK, MASK]
    assert block.positions.tolist() == [5, 6, 7, 8]
    assert block_slots(block) == [[13, 14, 15, 20]]  # 3*4 + 1..3, 5*4 + 0
    assert block.query_start_loc.tolist() == [0, 4]
    assert block.seq_lens.tolist() == [9]
    assert (block.num_query_rows, block.max_seq_len) == (4, 9)
    assert block.block_tables is PREFILL.block_tables


def test_dtypes_are_what_attention_metadata_takes() -> None:
    block = block_inputs(DECODE, (4,), 3, MASK, LIMIT)
    assert (block.input_ids.dtype, block.positions.dtype) == (torch.int32, torch.int64)
    assert (block.query_start_loc.dtype, block.seq_lens.dtype) == (torch.int32, torch.int32)
    assert {slots.dtype for slots in block.slot_mappings} == {torch.int64}
    assert {slots.dtype for slots in context_rows(DECODE, (4,)).slot_mappings} == {torch.int64}


def test_rejected_rows_write_nothing() -> None:
    """Rows 8 and 9 hold tokens that are not in the text."""
    assert context_slots(DECODE, 4) == [[14, 15, NOTHING, NOTHING]]  # 3*4 + 2..3


def test_block_overtakes_rejected_rows() -> None:
    """The block starts where the accepted context ends, at 8, not past the rejected rows, at 10."""
    block = block_inputs(DECODE, (4,), 3, MASK, LIMIT)
    assert block.positions.tolist() == [8, 9, 10, 11]
    assert block_slots(block) == [[20, 21, 22, 23]]
    assert block.seq_lens.tolist() == [12]
    assert block.max_seq_len == 14  # the host does not know of rejections: 10 + 4


def test_all_drafts_rejected_keeps_the_anchor_row() -> None:
    step = make_step([6, 7, 8, 9], [0, 4], [10], [3], [42], [[7, 3, 5]])
    assert context_slots(step, 4) == [[14, NOTHING, NOTHING, NOTHING]]
    assert block_inputs(step, (4,), 3, MASK, LIMIT).positions.tolist() == [7, 8, 9, 10]


def test_no_rejections_and_unknown_rejections_are_the_same() -> None:
    counted = make_step([0, 1, 2, 3, 4], [0, 5], [5], [0], [42], [[7, 3, 5]])
    assert context_slots(counted, 4) == context_slots(PREFILL, 4)
    blocks = [block_inputs(step, (4,), 3, MASK, LIMIT) for step in (counted, PREFILL)]
    assert blocks[0].positions.tolist() == blocks[1].positions.tolist()
    assert block_slots(blocks[0]) == block_slots(blocks[1])
    assert blocks[0].seq_lens.tolist() == blocks[1].seq_lens.tolist()


# A chunk of A's prompt (rows 4..6, next prompt token 11) beside B's decode (rows 5..7, the last one rejected).
MIXED = make_step([4, 5, 6, 5, 6, 7], [0, 3, 6], [7, 8], [0, 1], [11, 12], [[2, 4, 0], [6, 1, 9]])


def test_requests_of_a_mixed_batch_keep_to_their_own_blocks() -> None:
    assert context_slots(MIXED, 4) == [[16, 17, 18, 5, 6, NOTHING]]  # A: 4*4 + 0..2; B: 1*4 + 1..2


def test_blocks_of_a_mixed_batch() -> None:
    block = block_inputs(MIXED, (4,), 2, MASK, LIMIT)
    assert block.input_ids.tolist() == [11, MASK, MASK, 12, MASK, MASK]
    assert block.positions.tolist() == [7, 8, 9, 7, 8, 9]
    # A: 4*4 + 3, then a block it has not got; B: 1*4 + 3, 9*4 + 0..1
    assert block_slots(block) == [[19, NOTHING, NOTHING, 7, 36, 37]]
    assert block.query_start_loc.tolist() == [0, 3, 6]
    assert block.seq_lens.tolist() == [10, 10]
    assert block.max_seq_len == 11


def test_rejections_of_one_request_do_not_shift_the_next() -> None:
    step = make_step([3, 4, 5, 3, 4, 5], [0, 3, 6], [6, 6], [2, 0], [1, 2], [[1, 2], [3, 4]])
    assert context_slots(step, 4) == [[7, NOTHING, NOTHING, 15, 16, 17]]
    assert block_inputs(step, (4,), 1, MASK, LIMIT).positions.tolist() == [4, 5, 6, 7]


def test_null_block_is_never_written() -> None:
    """Every request sees physical block 0; an unallocated entry of a table points there."""
    step = make_step([0, 1, 4], [0, 3], [5], None, [42], [[0, 0, 0]])
    assert context_slots(step, 4) == [[NOTHING] * 3]
    assert block_slots(block_inputs(step, (4,), 3, MASK, LIMIT)) == [[NOTHING] * 4]


def test_rows_past_the_table_write_nothing() -> None:
    """They must not wrap into a neighbour's row of the table either."""
    step = make_step([6, 7, 6, 7], [0, 2, 4], [8, 8], None, [1, 2], [[1, 2], [3, 4]])
    block = block_inputs(step, (4,), 1, MASK, LIMIT)
    assert block.positions.tolist() == [8, 9, 8, 9]
    assert block_slots(block) == [[NOTHING] * 4]


def test_rows_past_max_model_len_write_nothing_and_stay_in_range() -> None:
    step = make_step([7], [0, 1], [8], None, [42], [[1, 2, 3]])
    block = block_inputs(step, (4,), 3, MASK, max_model_len=10)
    assert block.positions.tolist() == [8, 9, 9, 9]
    assert block_slots(block) == [[12, 13, NOTHING, NOTHING]]
    assert block.seq_lens.tolist() == [10]
    assert block.max_seq_len == 10


def test_one_request_at_its_limit_does_not_stop_the_others() -> None:
    step = make_step([9, 2], [0, 1, 2], [10, 3], None, [1, 2], [[1, 2, 3], [4, 5, 6]])
    block = block_inputs(step, (4,), 2, MASK, max_model_len=10)
    assert block.positions.tolist() == [9, 9, 9, 3, 4, 5]
    assert block_slots(block) == [[NOTHING, NOTHING, NOTHING, 19, 20, 21]]  # 4*4 + 3, 5*4 + 0..1
    assert block.seq_lens.tolist() == [10, 6]


def test_rows_padded_past_the_last_request_write_nothing() -> None:
    """A runner pads to a captured size; position 0 of such a row is nobody's."""
    step = make_step([4, 5, 0, 0, 0], [0, 2], [6], [0], [42], [[7, 3]])
    assert context_slots(step, 4) == [[12, 13, NOTHING, NOTHING, NOTHING]]
    unknown = make_step([4, 5, 0, 0, 0], [0, 2], [6], None, [42], [[7, 3]])
    assert context_slots(unknown, 4) == [[12, 13, NOTHING, NOTHING, NOTHING]]


def test_groups_have_their_own_block_size_and_table() -> None:
    step = make_step([4, 5], [0, 2], [6], [1], [42], [[1, 2, 3]], [[5, 6, 7, 8, 9]])
    assert context_slots(step, 4, 2) == [[8, NOTHING], [14, NOTHING]]  # 2*4 + 0; 7*2 + 0
    block = block_inputs(step, (4, 2), 2, MASK, LIMIT)
    assert block.positions.tolist() == [5, 6, 7]
    assert block_slots(block) == [[9, 10, 11], [15, 16, 17]]  # 2*4 + 1..3; 7*2 + 1, 8*2 + 0..1


def test_groups_that_do_not_match_their_block_sizes_are_an_error() -> None:
    with pytest.raises(ValueError):
        context_rows(PREFILL, (4, 2))


def test_host_bound_grows_by_the_block() -> None:
    step = make_step([4], [0, 1], [5], None, [42], [[1, 2]], upper_bound=[7])
    bound = block_inputs(step, (4,), 3, MASK, LIMIT).seq_lens_upper_bound
    assert bound is not None
    assert bound.tolist() == [11]
    assert block_inputs(PREFILL, (4,), 3, MASK, LIMIT).seq_lens_upper_bound is None


# Four requests in rows 5, 0, 3 and 2 of a state of six. The second and the last are in mid-prefill: nothing was
# sampled, and what they sampled last is another request's.
ANCHORS = AnchorSource(
    state_index=torch.tensor([5, 0, 3, 2], dtype=torch.int32),
    num_sampled=torch.tensor([1, 0, 4, 0], dtype=torch.int32),
    last_sampled=torch.tensor([[60], [61], [62], [63], [64], [65]], dtype=torch.int64),
    next_prompt_token=torch.tensor([70, 71, 72, 73, 74, 75], dtype=torch.int32),
)


def test_anchors_from_a_runners_state() -> None:
    assert ANCHORS.gather().tolist() == [65, 70, 63, 72]


def test_block_with_anchors_from_a_runners_state() -> None:
    """The same block as with anchors that were gathered before."""
    tables = [[2, 4, 0], [6, 1, 9], [3, 5, 0], [7, 8, 0]]
    gathered = make_step(
        [4, 5, 6, 5, 6, 7, 0, 3], [0, 3, 6, 7, 8], [7, 8, 1, 4], [0, 1, 0, 0], [65, 70, 63, 72], tables
    )
    block = block_inputs(replace(gathered, anchors=ANCHORS), (4,), 2, MASK, LIMIT)
    assert block.input_ids.tolist() == [65, MASK, MASK, 70, MASK, MASK, 63, MASK, MASK, 72, MASK, MASK]
    assert block.input_ids.dtype == torch.int32
    expected = block_inputs(gathered, (4,), 2, MASK, LIMIT)
    assert block.positions.tolist() == expected.positions.tolist()
    assert block_slots(block) == block_slots(expected)
    assert block.query_start_loc.tolist() == [0, 3, 6, 9, 12]
    assert block.seq_lens.tolist() == [10, 10, 4, 7]


def test_inputs_are_left_as_they_were() -> None:
    """The runner's tensors are used again by the next step."""
    step = make_step([6, 7, 8, 9], [0, 4], [10], [2], [42], [[7, 3, 5]])
    context_rows(step, (4,))
    block_inputs(step, (4,), 3, MASK, 9)
    assert (step.positions.tolist(), step.seq_lens.tolist()) == ([6, 7, 8, 9], [10])
    assert (step.anchors.tolist(), step.block_tables[0].tolist()) == ([42], [[7, 3, 5]])


# Any batch, against loops.


@dataclass
class Request:
    before: int  # context rows in the cache before this step
    rows: int  # target rows of this step
    rejected: int
    anchor: int
    tables: list[list[int]]  # one row of each group's table; 0 where nothing is allocated


@dataclass
class Batch:
    requests: list[Request]
    padding: int  # rows past the last request's
    block_sizes: tuple[int, ...]
    num_speculative_tokens: int
    max_model_len: int
    knows_rejections: bool


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    block_sizes = tuple(draw(st.lists(st.sampled_from([1, 2, 4, 16]), min_size=1, max_size=3)))
    max_model_len = draw(st.integers(4, 40))
    knows_rejections = draw(st.booleans())
    num_requests = draw(st.integers(1, 4))
    widths = [-(-max_model_len // size) for size in block_sizes]
    # Physical blocks in any order, each of them one request's; some entries not allocated.
    pools = [iter(draw(st.permutations(range(1, 1 + num_requests * width)))) for width in widths]
    requests = []
    for _ in range(num_requests):
        rows = draw(st.integers(1, min(6, max_model_len)))
        requests.append(
            Request(
                before=draw(st.integers(0, max_model_len - rows)),
                rows=rows,
                rejected=draw(st.integers(0, rows - 1)) if knows_rejections else 0,
                anchor=draw(st.integers(0, 90)),
                tables=[
                    [draw(st.sampled_from([next(pool)] * 4 + [0])) for _ in range(width)]
                    for pool, width in zip(pools, widths, strict=True)
                ],
            )
        )
    return Batch(
        requests=requests,
        padding=draw(st.integers(0, 3)),
        block_sizes=block_sizes,
        num_speculative_tokens=draw(st.integers(1, 8)),
        max_model_len=max_model_len,
        knows_rejections=knows_rejections,
    )


def as_step(batch: Batch) -> StepInputs:
    positions, starts = [], [0]
    for request in batch.requests:
        positions += range(request.before, request.before + request.rows)
        starts.append(len(positions))
    return make_step(
        positions + [0] * batch.padding,
        starts,
        [request.before + request.rows for request in batch.requests],
        [request.rejected for request in batch.requests] if batch.knows_rejections else None,
        [request.anchor for request in batch.requests],
        *([request.tables[group] for request in batch.requests] for group in range(len(batch.block_sizes))),
    )


def slot(table: list[int], position: int, block_size: int) -> int:
    """By the definition of a paged cache."""
    column = position // block_size
    if column >= len(table) or table[column] == 0:
        return NOTHING
    return table[column] * block_size + position % block_size


def expected_context_slots(batch: Batch, group: int) -> list[int]:
    slots = []
    for request in batch.requests:
        for row in range(request.rows):
            accepted = row < request.rows - request.rejected
            at = slot(request.tables[group], request.before + row, batch.block_sizes[group])
            slots.append(at if accepted else NOTHING)
    return slots + [NOTHING] * batch.padding


@settings(deadline=None, max_examples=150)
@given(batches())
def test_context_rows_of_any_batch(batch: Batch) -> None:
    actual = context_slots(as_step(batch), *batch.block_sizes)
    assert actual == [expected_context_slots(batch, group) for group in range(len(batch.block_sizes))]


@settings(deadline=None, max_examples=150)
@given(batches())
def test_block_inputs_of_any_batch(batch: Batch) -> None:
    ids, positions, seq_lens = [], [], []
    slots: list[list[int]] = [[] for _ in batch.block_sizes]
    for request in batch.requests:
        context = request.before + request.rows - request.rejected
        for row in range(1 + batch.num_speculative_tokens):
            ids.append(request.anchor if row == 0 else MASK)
            fits = context + row < batch.max_model_len
            positions.append(context + row if fits else batch.max_model_len - 1)
            for group, size in enumerate(batch.block_sizes):
                slots[group].append(slot(request.tables[group], context + row, size) if fits else NOTHING)
        seq_lens.append(min(context + 1 + batch.num_speculative_tokens, batch.max_model_len))
    step = as_step(batch)
    block = block_inputs(step, batch.block_sizes, batch.num_speculative_tokens, MASK, batch.max_model_len)
    assert block.input_ids.tolist() == ids
    assert block.positions.tolist() == positions
    assert block.seq_lens.tolist() == seq_lens
    assert max(seq_lens) <= block.max_seq_len <= batch.max_model_len
    assert block_slots(block) == slots


@settings(deadline=None, max_examples=150)
@given(batches())
def test_no_two_rows_of_a_step_write_the_same_slot(batch: Batch) -> None:
    """Accepted context, and every request's scratch rows, stay clear of each other."""
    step = as_step(batch)
    context = context_slots(step, *batch.block_sizes)
    block = block_inputs(step, batch.block_sizes, batch.num_speculative_tokens, MASK, batch.max_model_len)
    for of_context, of_block in zip(context, block_slots(block), strict=True):
        written = [at for at in of_context + of_block if at != NOTHING]
        assert len(written) == len(set(written))
