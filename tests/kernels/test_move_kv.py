# SPDX-License-Identifier: Apache-2.0
"""Accepted rows of trees in paged caches, worked out by hand: a slot holds its own number, a layer hundreds more."""

from __future__ import annotations

import pytest
import torch

from vllm_dflash.kernels.move_kv import KVCaches, move_accepted_kv

BLOCKS, HEADS, BLOCK_SIZE, WIDTH = 6, 3, 4, 20
#: Two requests: a verification of six rows that goes over from block 1 to block 5, and one of four in block 3.
SLOTS = [6, 7, 20, 21, 22, 23, 12, 13, 14, 15]


def caches(device: str, num_layers: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """[blocks, heads, block size, width] as views of [blocks, block size, heads, width], as a GPU's are."""
    slots = torch.arange(BLOCKS * BLOCK_SIZE).view(BLOCKS, BLOCK_SIZE, 1, 1)
    made = []
    for layer in range(num_layers):
        whole = slots + 100 * layer + torch.zeros(1, 1, HEADS, WIDTH)
        made.append(whole.to(dtype).to(device).transpose(1, 2))
    return made


def move(device: str, tensors: list[torch.Tensor], ways: list[list[int]], num_sampled: list[int]) -> None:
    move_accepted_kv(
        KVCaches.of(tensors),
        torch.tensor(SLOTS, device=device),
        torch.tensor(ways, dtype=torch.int32, device=device),
        torch.tensor([1, 0], device=device),  # request 0 is row 1 of the state
        torch.tensor([0, 6, 10], device=device),
        torch.tensor([0, 6, 10], device=device),
        torch.tensor(num_sampled, device=device),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_hand(device: str, dtype: torch.dtype) -> None:
    """Rows 2, 3 and 5 of the first request become rows 1, 2 and 3: what is overwritten has been read before."""
    tensors = caches(device, 3, dtype)
    move(device, tensors, [[1, 3, 0], [2, 3, 5]], [3, 4][::-1])
    for layer, cache in enumerate(tensors):
        expected = list(range(BLOCKS * BLOCK_SIZE))
        expected[7], expected[20], expected[21] = 20, 21, 23
        expected[14] = 15  # row 3 of the second request to its row 2; its row 1 stays
        for head in range(HEADS):
            got = cache[:, head].float() - 100 * layer
            assert got[..., 0].flatten().tolist() == expected
            assert (got == got[..., :1]).all(), "part of a row"


def test_nothing_accepted_moves_nothing(device: str) -> None:
    tensors = caches(device, 1, torch.float32)
    move(device, tensors, [[2, 3, 0], [2, 3, 5]], [1, 0])
    assert tensors[0][:, 0, :, 0].flatten().tolist() == list(range(BLOCKS * BLOCK_SIZE))


def test_only_what_is_accepted_moves(device: str) -> None:
    tensors = caches(device, 1, torch.float32)
    move(device, tensors, [[2, 3, 0], [2, 3, 5]], [2, 1])
    expected = list(range(BLOCKS * BLOCK_SIZE))
    expected[7] = 20
    assert tensors[0][:, 1, :, 7].flatten().tolist() == expected


def test_caches_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="must be alike"):
        KVCaches.of([torch.zeros(2, 1, 4, 8), torch.zeros(2, 2, 4, 8)])
    with pytest.raises(ValueError, match="contiguous rows"):
        KVCaches.of([torch.zeros(2, 1, 8, 4).transpose(2, 3)])
