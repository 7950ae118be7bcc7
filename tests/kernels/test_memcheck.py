# SPDX-License-Identifier: Apache-2.0
"""An interpreted kernel that leaves its tensors is noticed, and one that does not is left alone."""

from __future__ import annotations

import pytest
import torch
from triton.runtime.errors import InterpreterError
from vllm.triton_utils import tl, triton

NUM_VALUES = 5


@pytest.fixture(autouse=True)
def interpreted(device: str) -> None:
    if device != "cpu":
        pytest.skip("kernels run natively here, where compute-sanitizer checks them")


@triton.jit
def _copy_kernel(to_ptr, from_ptr, to_offset, from_offset, N: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    values = tl.load(from_ptr + from_offset + places, mask=places < N, other=0)
    tl.store(to_ptr + to_offset + places, values, mask=places < N)


@triton.jit
def _add_kernel(sum_ptr, offset):
    tl.atomic_add(sum_ptr + offset, 1)


@triton.jit
def _swap_kernel(lock_ptr, offset):
    tl.atomic_cas(lock_ptr + offset, 0, 1)


@triton.jit
def _read_by_address_kernel(to_ptr, addresses_ptr, table, offset):
    from_ptr = tl.load(addresses_ptr + table).to(tl.pointer_type(to_ptr.dtype.element_ty))
    tl.store(to_ptr, tl.load(from_ptr + offset))


def copy(to_offset: int = 0, from_offset: int = 0, num_values: int = NUM_VALUES) -> list[int]:
    values, copied = torch.arange(NUM_VALUES), torch.zeros(NUM_VALUES, dtype=torch.int64)
    _copy_kernel[(1,)](copied, values, to_offset, from_offset, N=num_values, BLOCK=8)
    return copied.tolist()


def test_masked_lanes_may_point_anywhere() -> None:
    assert copy() == [0, 1, 2, 3, 4]
    assert copy(1, 2, 3) == [0, 2, 3, 4, 0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, 0, 6), "load of 8 bytes at 1 of 6 addresses .* first at byte 40 of a storage of 40"),
        ((0, 1), "load of 8 bytes at 1 of 5"),
        ((0, -1), "load of 8 bytes at 1 of 5"),
        ((2, 0, 4), "store of 8 bytes at 1 of 4 .* first at byte 40 of a storage of 40"),
        ((-2, 0), "store of 8 bytes at 2 of 5"),
    ],
)
def test_outside(arguments: tuple[int, ...], said: str) -> None:
    with pytest.raises(InterpreterError, match=said):
        copy(*arguments)


@pytest.mark.parametrize(("kernel", "said"), [(_add_kernel, "atomic update"), (_swap_kernel, "atomic swap")])
def test_atomics(kernel: triton.JITFunction, said: str) -> None:
    count = torch.zeros(2, dtype=torch.int32)
    kernel[(1,)](count, 1)
    assert count.tolist() == [0, 1]
    with pytest.raises(InterpreterError, match=f"{said} of 4 bytes at 1 of 1 addresses"):
        kernel[(1,)](count, 2)


def test_addresses_lead_to_tensors() -> None:
    tables, copied = [torch.arange(3), torch.arange(3) + 10], torch.zeros(1, dtype=torch.int64)
    addresses = torch.tensor([table.data_ptr() for table in tables])
    _read_by_address_kernel[(1,)](copied, addresses, 1, 2)
    assert copied.item() == 12
    with pytest.raises(InterpreterError, match="load of 8 bytes at 1 of 1 addresses .* byte 24 of a storage of 24"):
        _read_by_address_kernel[(1,)](copied, addresses, 0, 3)


def test_a_launch_says_nothing_of_the_next() -> None:
    """A tensor that only an earlier launch had is none of this one's."""
    others = torch.zeros(NUM_VALUES, dtype=torch.int64)
    _copy_kernel[(1,)](others, others, 0, 0, N=NUM_VALUES, BLOCK=8)
    values = torch.zeros(1, dtype=torch.int64)
    distance = (others.data_ptr() - values.data_ptr()) // 8
    with pytest.raises(InterpreterError, match="load of 8 bytes"):
        _copy_kernel[(1,)](values, values, 0, distance, N=1, BLOCK=8)
