# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter refuses to leave a launch's tensors, as compute-sanitizer's memcheck does on a GPU.

numpy reads or writes any address that it is given, so a kernel that leaves its tensors mostly goes unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch


class Memory:
    """What the launch under way may touch: its tensors' storages, and those whose addresses it reads in them."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}  # bytes of the storage at this address
        self._asked: dict[int, tuple[int, int]] = {}  # of an address, its storage's address and bytes

    def begin_launch(self, arguments: Iterable[Any]) -> None:
        self._sizes = dict(map(_extent, _tensors(arguments)))

    def note_address(self, tensor: torch.Tensor, address: int) -> None:
        """Somebody asks for the address of a tensor, maybe for a kernel to read there."""
        self._asked[address] = _extent(tensor)

    def follow(self, addresses: np.ndarray) -> None:
        """The kernel makes pointers of these numbers. Each is the address of a tensor, or none that it will use."""
        self._sizes.update(self._asked[address] for address in addresses.ravel().tolist() if address in self._asked)

    def check(self, access: str, pointers: Any, mask: Any | None) -> None:
        """Of handles. Raises IndexError if an address that is not masked is in none of the storages."""
        addresses = pointers.data if mask is None else pointers.data[mask.data.astype(bool)]
        addresses = addresses.ravel().astype(np.uint64)
        if not addresses.size:
            return
        width = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        storages = [(0, 0), *sorted(self._sizes.items())]  # nothing is allocated at 0
        begins, sizes = np.array(storages, dtype=np.uint64).T
        nearest = np.searchsorted(begins, addresses, side="right") - 1
        offsets, sizes = addresses - begins[nearest], sizes[nearest]
        outside = offsets + width > sizes
        if outside.any():
            raise IndexError(
                f"a {access} of {width} bytes at {outside.sum()} of {outside.size} addresses outside of the launch's "
                f"tensors, first at byte {offsets[outside][0]} of a storage of {sizes[outside][0]}"
            )


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and bytes of a tensor's storage."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


def install() -> None:
    """Check all accesses of interpreted kernels from here on, in this process. Once: `tests.triton_cpu` does it."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    memory = Memory()
    prepare, as_pointer = GridExecutor._init_args_hst, InterpreterBuilder.create_int_to_ptr
    address_of = torch.Tensor.data_ptr

    def prepared(self: Any, arguments: Any, named: dict[str, Any]) -> Any:
        on_host, named_on_host = prepare(self, arguments, named)
        memory.begin_launch((*on_host, *named_on_host.values()))
        return on_host, named_on_host

    def followed(self: Any, numbers: Any, pointer_type: Any) -> Any:
        memory.follow(numbers.data)
        return as_pointer(self, numbers, pointer_type)

    def asked(self: torch.Tensor) -> int:
        memory.note_address(self, address := address_of(self))
        return address

    def checked(method: Callable[..., Any], access: str, pointers_at: int, mask_at: int | None) -> Callable[..., Any]:
        def access_memory(self: Any, *operands: Any) -> Any:
            memory.check(access, operands[pointers_at], None if mask_at is None else operands[mask_at])
            return method(self, *operands)

        return access_memory

    GridExecutor._init_args_hst, InterpreterBuilder.create_int_to_ptr = prepared, followed
    torch.Tensor.data_ptr = asked
    for name, access, pointers_at, mask_at in (
        ("create_masked_load", "load", 0, 1),
        ("create_masked_store", "store", 0, 2),
        ("create_atomic_rmw", "atomic update", 1, 3),
        ("create_atomic_cas", "atomic swap", 0, None),
    ):
        setattr(InterpreterBuilder, name, checked(getattr(InterpreterBuilder, name), access, pointers_at, mask_at))
