# SPDX-License-Identifier: Apache-2.0
"""From the QKV product to attention: literals by hand in sentinel-filled caches, then any layout against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.numerics import assert_as_close_as_baseline
from vllm_dflash.kernels.qkv import norm_rope_cache, reference_norm_rope_cache

UNTOUCHED = 77.0
FP8 = torch.float8_e4m3fn
NOTHING = -1  # the slot that writes nothing


def make_cache(
    device: str, dtype: torch.dtype, blocks: int, heads: int, block_size: int, head_dim: int, layout: str = "HND"
) -> torch.Tensor:
    """A cache of sentinels, [blocks, heads, block_size, 2*D] however it lies in memory."""
    if layout == "HND":
        cache = torch.full((blocks, heads, block_size, 2 * head_dim), UNTOUCHED, device=device)
    elif layout == "NHD":
        cache = torch.full((blocks, block_size, heads, 2 * head_dim), UNTOUCHED, device=device).transpose(1, 2)
    else:  # keys and values each in a half of their own of a wider buffer
        wide = torch.full((blocks, heads, block_size, 2 * head_dim, 3), UNTOUCHED, device=device)
        return wide.to(dtype)[..., 1]
    return cache.to(dtype)


def quarter_turns(device: str, positions: int, rotary_dim: int) -> torch.Tensor:
    """A table that turns every pair by 90 degrees times the position."""
    angles = torch.arange(positions, device=device)[:, None] * (math.pi / 2) * torch.ones(rotary_dim // 2).to(device)
    return torch.cat((angles.cos(), angles.sin()), dim=1).round()


def tensor(device: str, *values: int) -> torch.Tensor:
    return torch.tensor(values, device=device, dtype=torch.int64)


def test_rotation_by_hand(device: str) -> None:
    # One query head, one KV head of 4; position 1 turns (a, b) into (-b, a).
    qkv = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]], device=device)
    cache = make_cache(device, torch.float32, 3, 1, 2, 4)
    arguments = (qkv, None, None, 1e-6, quarter_turns(device, 2, 4), tensor(device, 1), tensor(device, 5), cache)
    assert norm_rope_cache(*arguments).tolist() == [[[-3, -4, 1, 2]]]
    assert cache[2, 0, 1].tolist() == [-7, -8, 5, 6, 9, 10, 11, 12]
    assert norm_rope_cache(*arguments, is_neox_style=False).tolist() == [[[-2, 1, -4, 3]]]
    assert cache[2, 0, 1].tolist() == [-6, 5, -8, 7, 9, 10, 11, 12]
    cache[2, 0, 1] = UNTOUCHED
    assert (cache == UNTOUCHED).all(), "written outside of the slot"


def test_partial_rotation_by_hand(device: str) -> None:
    # Heads of 6, of which the first 4 turn.
    qkv = torch.arange(1.0, 19, device=device)[None]
    cache = make_cache(device, torch.float32, 2, 1, 2, 6)
    arguments = (qkv, None, None, 1e-6, quarter_turns(device, 2, 4), tensor(device, 1), tensor(device, 2), cache)
    assert norm_rope_cache(*arguments).tolist() == [[[-3, -4, 1, 2, 5, 6]]]
    assert cache[1, 0, 0].tolist() == [-9, -10, 7, 8, 11, 12, 13, 14, 15, 16, 17, 18]
    assert norm_rope_cache(*arguments, is_neox_style=False).tolist() == [[[-2, 1, -4, 3, 5, 6]]]


def test_norm_by_hand(device: str) -> None:
    # Mean square of [2, 2, 2, 2] is 4, and with eps 12 the root is 4. Values are never normed.
    qkv = torch.full((1, 12), 2.0, device=device)
    cache = make_cache(device, torch.float32, 2, 1, 1, 4)
    q_weight, k_weight = torch.arange(4.0, device=device), torch.full((4,), 10.0, device=device)
    table, at, slot = quarter_turns(device, 1, 4), tensor(device, 0), tensor(device, 1)
    q = norm_rope_cache(qkv, q_weight, k_weight, 12.0, table, at, slot, cache)
    assert q.tolist() == [[[0, 0.5, 1, 1.5]]]
    assert cache[1, 0, 0].tolist() == [5, 5, 5, 5, 2, 2, 2, 2]
    norm_rope_cache(qkv, q_weight, None, 12.0, table, at, slot, cache)
    assert cache[1, 0, 0].tolist() == [2] * 8


def test_padding_rows_write_nothing_and_the_null_block_stays(device: str) -> None:
    qkv = torch.randn(4, 12, device=device)
    # The blocks before the null block are where slot -1 would be.
    memory = make_cache(device, torch.float32, 5, 1, 2, 4)
    cache = memory[2:]
    slots = tensor(device, NOTHING, 4, NOTHING, 2)
    positions = tensor(device, 0, 1, 0, 1)
    q = norm_rope_cache(qkv, None, None, 1e-6, quarter_turns(device, 2, 4), positions, slots, cache)
    assert torch.equal(q[0, 0], qkv[0, :4]), "padding rows have queries too"
    assert torch.equal(cache[2, 0, 0, 4:], qkv[1, 8:]) and torch.equal(cache[1, 0, 0, 4:], qkv[3, 8:])
    cache[2, 0, 0], cache[1, 0, 0] = UNTOUCHED, UNTOUCHED
    assert (memory == UNTOUCHED).all(), "written to other slots"


@pytest.mark.parametrize("layout", ["HND", "NHD", "spread"])
@pytest.mark.parametrize("is_neox_style", [True, False], ids=["neox", "interleaved"])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (24, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_layout_is_as_exact_as_torch(
    device: str, dtype: torch.dtype, head_dim: int, rotary_dim: int, is_neox_style: bool, layout: str
) -> None:
    torch.manual_seed(0)
    num_rows, heads, kv_heads, block_size = 5, 6, 2, 4
    wide_qkv = torch.randn(num_rows, (heads + 2 * kv_heads) * head_dim + 8, device=device).to(dtype)
    qkv = wide_qkv[:, :-8]  # a row's stride is not its width
    q_weight, k_weight = ((torch.rand(head_dim, device=device) + 0.5).to(dtype) for _ in range(2))
    table = torch.randn(9, rotary_dim, device=device)
    positions = torch.randint(0, 9, (num_rows,), device=device)
    slots = tensor(device, 4, 11, NOTHING, 6, 9)
    weights = (q_weight, k_weight, 1e-6, table)
    rest: dict[str, Any] = {"is_neox_style": is_neox_style}

    def reference(kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        cache = make_cache(device, kind, 3, kv_heads, block_size, head_dim)
        arguments = [value.to(kind) if torch.is_tensor(value) else value for value in (qkv, *weights)]
        return reference_norm_rope_cache(*arguments, positions, slots, cache, **rest), cache

    cache = make_cache(device, dtype, 3, kv_heads, block_size, head_dim, layout)
    out = torch.full((num_rows + 2, heads, head_dim), UNTOUCHED, dtype=dtype, device=device)
    q = norm_rope_cache(qkv, *weights, positions, slots, cache, out=out[1:-1], **rest)
    assert q.data_ptr() == out[1:].data_ptr()
    assert (out[0] == UNTOUCHED).all() and (out[-1] == UNTOUCHED).all(), "written outside"
    (true_q, true_cache), (plain_q, plain_cache) = reference(torch.float64), reference(dtype)
    assert_as_close_as_baseline("q", q, true_q, plain_q)
    assert torch.equal(cache == UNTOUCHED, true_cache == UNTOUCHED), "other slots than the reference's"
    untouched = true_cache == UNTOUCHED
    caches = [each.masked_fill(untouched, 0) for each in (cache, true_cache, plain_cache)]
    assert_as_close_as_baseline("cache", *caches)


@pytest.mark.parametrize("as_bytes", [False, True], ids=["fp8", "uint8"])
def test_an_fp8_cache_holds_numbers_over_their_scale(device: str, as_bytes: bool) -> None:
    # Numbers that FP8 has, so that nothing hinges on rounding; and one that is too large for it.
    qkv = torch.tensor([[0.0, 0, 0, 0, 1, -3, 0.5, 26, 8, -12, 1e6, -1e6]], device=device)
    cache = make_cache(device, FP8, 2, 1, 1, 4)
    before = cache.clone().float()
    k_scale, v_scale = torch.tensor(0.5, device=device), torch.tensor(4.0, device=device)
    norm_rope_cache(
        qkv,
        None,
        None,
        1e-6,
        quarter_turns(device, 1, 4),
        tensor(device, 0),
        tensor(device, 1),
        cache.view(torch.uint8) if as_bytes else cache,
        k_scale,
        v_scale,
    )
    assert cache[1, 0, 0].float().tolist() == [2, -6, 1, 52, 2, -3, 448, -448]
    assert torch.equal(cache[0].float(), before[0])


@pytest.mark.gpu
def test_an_fp8_cache_rounds_as_torch_does() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(7, 12 * 64, device="cuda", dtype=torch.bfloat16)
    weight, table = torch.rand(64, device="cuda", dtype=torch.bfloat16), torch.randn(9, 64, device="cuda")
    positions, slots = torch.arange(7, device="cuda"), torch.arange(7, device="cuda") + 4
    scale = torch.tensor(0.03, device="cuda")
    cache, expected = (make_cache("cuda", FP8, 3, 2, 4, 64) for _ in range(2))
    common = (qkv, weight, weight, 1e-6, table, positions, slots)
    norm_rope_cache(*common, cache, scale, scale)
    reference_norm_rope_cache(*common, expected, scale, scale)
    # Keys may differ by a step of bf16 before they are rounded to FP8, so by a step of FP8 after.
    torch.testing.assert_close(cache.float(), expected.float(), rtol=0.13, atol=0.02)
    assert torch.equal(cache[..., 64:].float(), expected[..., 64:].float())


def test_no_rows(device: str) -> None:
    cache = make_cache(device, torch.float32, 2, 1, 1, 4)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    q = norm_rope_cache(
        torch.empty(0, 12, device=device), None, None, 1e-6, quarter_turns(device, 1, 4), nothing, nothing, cache
    )
    assert q.shape == (0, 1, 4) and (cache == UNTOUCHED).all()


def test_a_cache_of_another_type_is_refused(device: str) -> None:
    qkv, at = torch.ones(1, 12, device=device), tensor(device, 0)
    with pytest.raises(AssertionError, match="cache"):
        cache = make_cache(device, torch.float16, 2, 1, 1, 4)
        norm_rope_cache(qkv, None, None, 1e-6, quarter_turns(device, 1, 4), at, at, cache)
