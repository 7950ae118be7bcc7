# SPDX-License-Identifier: Apache-2.0
"""The kernel that fills the draft caches: literals by hand, then random inputs against plain torch in 64 bits.

Every cache is filled with a sentinel first, and what the step does not own must still hold it afterwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from tests.numerics import assert_as_close_as_baseline
from vllm_dflash.kernels import context_kv
from vllm_dflash.kernels.context_kv import (
    LayerCaches,
    inject_context_kv,
    reference_context_kv,
    reference_inject_context_kv,
)

UNTOUCHED = 0.5  # exact in every dtype of a cache
NUM_BLOCKS = 6
FP8 = torch.float8_e4m3fn

# Numpy, which interprets the kernel, says so where a masked row is normed without an epsilon.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")


def contiguous(blocks: int, heads: int, slots: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    storage = torch.full((blocks, heads, slots, width), UNTOUCHED)
    return storage, storage


def heads_inside_slots(blocks: int, heads: int, slots: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    storage = torch.full((blocks, slots, heads, width), UNTOUCHED)
    return storage, storage.transpose(1, 2)


def beside_another_layer(blocks: int, heads: int, slots: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    storage = torch.full((blocks, 2, heads, slots, width), UNTOUCHED)
    return storage, storage[:, 1]


def unaligned(blocks: int, heads: int, slots: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    storage = torch.full((blocks, heads, slots, width + 1), UNTOUCHED)
    return storage, storage[..., 1:]


LAYOUTS = [contiguous, heads_inside_slots, beside_another_layer, unaligned]


@dataclass
class Case:
    """A step's inputs, and caches that are all sentinel."""

    kv: torch.Tensor  # [T, 2*L*heads*D]
    weight: torch.Tensor  # [L, D]
    cos_sin: torch.Tensor  # [positions, rotary size]
    positions: torch.Tensor  # [T]
    slots: torch.Tensor  # [G, T]
    storages: list[torch.Tensor]  # L; each holds a cache, and what lies between its elements
    caches: LayerCaches
    eps: float = 1e-6
    is_neox: bool = True

    def arguments(self) -> tuple:
        return (self.kv, self.weight, self.eps, self.cos_sin, self.is_neox, self.positions, self.slots, self.caches)

    def inject(self) -> list[torch.Tensor]:
        inject_context_kv(*self.arguments())
        return self.written()

    def written(self) -> list[torch.Tensor]:
        """Rows with a slot, each layer [rows, heads, 2*D]. All else must hold the sentinel; so do the caches then."""
        rows = []
        for storage, cache, group in zip(self.storages, self.caches.tensors, self.caches.groups, strict=True):
            at = [divmod(slot, cache.shape[2]) for slot in self.slots[group, : self.kv.shape[0]].tolist() if slot >= 0]
            rows.append(torch.stack([cache[block, :, offset].clone() for block, offset in at]))
            for block, offset in at:
                cache[block, :, offset] = torch.full_like(cache[block, :, offset].float(), UNTOUCHED).to(cache.dtype)
            assert (storage.view(cache.dtype).float() == UNTOUCHED).all(), "written outside of the step's slots"
        return rows


def make_caches(
    device: str,
    dtype: torch.dtype,
    shapes: list[tuple[int, int, int]],  # heads, slots in a block, D of each layer
    groups: list[int],
    layouts: list,
    scales: list[tuple[float, float]] | None = None,  # of keys and of values
) -> tuple[list[torch.Tensor], LayerCaches]:
    storages, caches = [], []
    for (heads, slots, size), layout in zip(shapes, layouts, strict=True):
        storage, cache = layout(NUM_BLOCKS, heads, slots, 2 * size)
        stored = storage.to(device, FP8 if dtype == torch.uint8 else dtype).view(dtype)
        storages.append(stored)
        caches.append(stored.as_strided(cache.shape, cache.stride(), cache.storage_offset()))
    columns = [[torch.tensor(pair[i], device=device) for pair in scales] for i in range(2)] if scales else [None, None]
    return storages, LayerCaches.of(caches, groups, *columns)


# By hand: 2 layers of one head of size 4, all layers in one group, blocks of 4 slots. A row's mean square is a power of
# four, so that the norm is exact: row 0 is 2, 2, 2, 2 in layer 0 and -4, -4, -4, -4 in layer 1.
WEIGHT = [[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]]
ROWS = [
    [2.0] * 4 + [-4.0] * 4 + [5.0, 6.0, 7.0, 8.0] + [50.0, 60.0, 70.0, 80.0],
    [1.0] * 4 + [8.0] * 4 + [1.0, 3.0, 5.0, 7.0] + [10.0, 30.0, 50.0, 70.0],
]


def by_hand(
    device: str,
    slots: list[list[int]],
    positions: list[int],
    cos_sin: list[list[float]],
    is_neox: bool = True,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype = torch.float32,
    scales: list[tuple[float, float]] | None = None,
) -> Case:
    storages, caches = make_caches(device, cache_dtype, [(1, 4, 4)] * 2, [0, 0], [contiguous] * 2, scales)
    return Case(
        kv=torch.tensor(ROWS, dtype=dtype, device=device),
        weight=torch.tensor(WEIGHT, dtype=dtype, device=device),
        cos_sin=torch.tensor(cos_sin, dtype=torch.float32, device=device),
        positions=torch.tensor(positions, device=device),
        slots=torch.tensor(slots, device=device),
        storages=storages,
        caches=caches,
        eps=0.0,
        is_neox=is_neox,
    )


#: Position 0: no rotation. Position 1: a quarter turn of both pairs. Position 2: of the first pair only.
TURNS = [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]]


def assert_rows(got: torch.Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(got[:, 0].float().cpu(), torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=0)


def test_keys_are_normed_with_their_layers_weight_and_values_stay(device: str) -> None:
    layers = by_hand(device, [[5, 18]], [0, 0], TURNS).inject()
    assert_rows(layers[0], [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 1, 3, 5, 7]])
    assert_rows(layers[1], [[-10, -20, -30, -40, 50, 60, 70, 80], [10, 20, 30, 40, 10, 30, 50, 70]])


def test_keys_turn_by_their_rows_position_in_halves(device: str) -> None:
    layers = by_hand(device, [[5, 18]], [1, 2], TURNS).inject()
    # A quarter turn takes a pair (x, y) to (-y, x). Pairs are columns 0, 2 and 1, 3.
    assert_rows(layers[0], [[-3, -4, 1, 2, 5, 6, 7, 8], [-3, 2, 1, 4, 1, 3, 5, 7]])
    assert_rows(layers[1], [[30, 40, -10, -20, 50, 60, 70, 80], [-30, 20, 10, 40, 10, 30, 50, 70]])


def test_keys_turn_by_their_rows_position_interleaved(device: str) -> None:
    layers = by_hand(device, [[5, 18]], [1, 2], TURNS, is_neox=False).inject()
    # Pairs are columns 0, 1 and 2, 3.
    assert_rows(layers[0], [[-2, 1, -4, 3, 5, 6, 7, 8], [-2, 1, 3, 4, 1, 3, 5, 7]])
    assert_rows(layers[1], [[20, -10, 40, -30, 50, 60, 70, 80], [-20, 10, 30, 40, 10, 30, 50, 70]])


@pytest.mark.parametrize("is_neox", [True, False])
def test_partial_rotation_leaves_the_rest(device: str, is_neox: bool) -> None:
    """One pair, columns 0 and 1. The norm is over the whole head all the same."""
    layers = by_hand(device, [[5, 18]], [1, 0], [[1.0, 0.0], [0.0, 1.0]], is_neox=is_neox).inject()
    assert_rows(layers[0], [[-2, 1, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 1, 3, 5, 7]])


def test_epsilon_is_added_to_the_mean_square(device: str) -> None:
    case = by_hand(device, [[5, 18]], [0, 0], TURNS)
    layers = replace(case, eps=12.0).inject()  # 2 / sqrt(4 + 12) and -4 / sqrt(16 + 12); 1 / sqrt(1 + 12)
    assert_rows(layers[0][:1, :, :4], [[0.5, 1.0, 1.5, 2.0]])
    assert_rows(layers[1][:1, :, :4], [[-4 / math.sqrt(28) * weight for weight in WEIGHT[1]]])
    assert_rows(layers[0][1:, :, :4], [[weight / math.sqrt(13) for weight in WEIGHT[0]]])


def test_negative_slots_write_nothing(device: str) -> None:
    layers = by_hand(device, [[-1, 18]], [0, 0], TURNS).inject()
    assert_rows(layers[0], [[1, 2, 3, 4, 1, 3, 5, 7]])
    assert_rows(layers[1], [[10, 20, 30, 40, 10, 30, 50, 70]])


def test_rows_without_a_slot_may_have_any_position_and_any_numbers(device: str) -> None:
    """Padding rows hold what an earlier step left there."""
    case = by_hand(device, [[-1, 18]], [2**40, 0], TURNS)
    case.kv[0] = math.nan
    assert_rows(case.inject()[0], [[1, 2, 3, 4, 1, 3, 5, 7]])


def test_step_without_any_slot_writes_nothing(device: str) -> None:
    case = by_hand(device, [[-1, -1]], [0, 0], TURNS)
    inject_context_kv(*case.arguments())
    assert all((storage == UNTOUCHED).all() for storage in case.storages)


def test_step_without_rows_writes_nothing(device: str) -> None:
    case = by_hand(device, [[5, 18]], [0, 0], TURNS)
    inject_context_kv(*replace(case, kv=case.kv[:0]).arguments())
    assert all((storage == UNTOUCHED).all() for storage in case.storages)


def test_positions_and_slots_past_the_rows_are_not_read(device: str) -> None:
    layers = by_hand(device, [[5, 18, 3, 2]], [0, 0, 1, 1], TURNS).inject()
    assert_rows(layers[0], [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 1, 3, 5, 7]])


def test_rows_may_be_part_of_wider_ones(device: str) -> None:
    case = by_hand(device, [[5, 18]], [1, 2], TURNS)
    wide = torch.full((2, 40), math.nan, device=device)
    wide[:, 8:24] = case.kv
    wide_turns = torch.full((3, 9), math.nan, device=device)
    wide_turns[:, :4] = case.cos_sin
    case = replace(case, kv=wide[:, 8:24], cos_sin=wide_turns[:, :4])
    assert_rows(case.inject()[1], [[30, 40, -10, -20, 50, 60, 70, 80], [-30, 20, 10, 40, 10, 30, 50, 70]])


def test_each_layer_uses_its_groups_slots_and_its_own_block_size(device: str) -> None:
    case = by_hand(device, [[5, 18], [11, -1]], [0, 0], TURNS)
    storages, caches = make_caches(
        device, torch.float32, [(1, 4, 4), (1, 8, 4)], [1, 0], [heads_inside_slots, beside_another_layer]
    )
    layers = replace(case, storages=storages, caches=caches).inject()
    assert_rows(layers[0], [[1, 2, 3, 4, 5, 6, 7, 8]])
    assert_rows(layers[1], [[-10, -20, -30, -40, 50, 60, 70, 80], [10, 20, 30, 40, 10, 30, 50, 70]])


def test_norm_rounds_before_the_weight(device: str) -> None:
    """As the model does. Found by search: with one rounding less this gives 507.25 and 1014.5."""
    storages, caches = make_caches(device, torch.float16, [(1, 4, 2)], [0], [contiguous])
    case = Case(
        kv=torch.tensor([[1.0, 2.0, 0.0, 0.0]], dtype=torch.float16, device=device),
        weight=torch.full((1, 2), 802.0, dtype=torch.float16, device=device),
        cos_sin=torch.tensor([[1.0, 0.0]], device=device),
        positions=torch.tensor([0], device=device),
        slots=torch.tensor([[0]], device=device),
        storages=storages,
        caches=caches,
        eps=0.0,
    )
    assert case.inject()[0][0, 0, :2].tolist() == [507.0, 1014.0]


# fp8. Numbers that fp8 holds exactly: the interpreter rounds to fp8 wrongly (a carry into the exponent is lost).


@pytest.mark.parametrize("cache_dtype", [FP8, torch.uint8])
def test_fp8_caches_hold_what_is_computed_divided_by_the_scale(device: str, cache_dtype: torch.dtype) -> None:
    scales = [(0.5, 0.25), (2.0, 10.0)]
    case = by_hand(device, [[5, 18]], [1, 0], TURNS, dtype=torch.bfloat16, cache_dtype=cache_dtype, scales=scales)
    layers = case.inject()
    assert layers[0].dtype == FP8
    assert_rows(layers[0], [[-6, -8, 2, 4, 20, 24, 28, 32], [2, 4, 6, 8, 4, 12, 20, 28]])
    assert_rows(layers[1], [[15, 20, -5, -10, 5, 6, 7, 8], [5, 10, 15, 20, 1, 3, 5, 7]])


def test_fp8_caches_saturate(device: str) -> None:
    scales = [(1 / 128, 1 / 64), (1.0, 1.0)]
    case = by_hand(device, [[5, -1]], [1, 0], TURNS, cache_dtype=FP8, scales=scales)
    assert_rows(case.inject()[0], [[-384, -448, 128, 256, 320, 384, 448, 448]])


# Random inputs.


def random_case(
    device: str,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
    *,
    num_rows: int = 7,
    heads: int = 3,
    head_size: int = 16,
    rotary: int = 16,
    is_neox: bool = True,
    layouts: tuple = (contiguous, heads_inside_slots, beside_another_layer),
    cos_sin_dtype: torch.dtype = torch.float32,
) -> Case:
    """3 layers in 2 groups with different block sizes. The layers' weights are a factor of 20 apart."""
    generator = torch.Generator().manual_seed(num_rows + heads + rotary)
    block_sizes, groups = [4, 8, 4], [0, 1, 0]
    storages, caches = make_caches(
        device,
        cache_dtype or dtype,
        [(heads, size, head_size) for size in block_sizes],
        groups,
        list(layouts),
        [(0.31, 0.02), (2.7, 0.005), (0.017, 0.01)],
    )
    weight = (1 + torch.rand(3, head_size, generator=generator)) * torch.tensor([0.05, 1.0, 20.0])[:, None]
    angles = torch.rand(40, rotary // 2, generator=generator) * 2 * math.pi
    # Every third row has no slot; block 0 is never used.
    slots = [torch.randperm(size * (NUM_BLOCKS - 1), generator=generator)[:num_rows] + size for size in (4, 8)]
    rows = torch.arange(num_rows)
    return Case(
        kv=torch.randn(num_rows, 6 * heads * head_size, generator=generator).to(device, dtype),
        weight=weight.to(device, dtype),
        cos_sin=torch.cat((angles.cos(), angles.sin()), -1).to(device, cos_sin_dtype),
        positions=torch.randint(40, (num_rows,), generator=generator).to(device),
        slots=torch.stack([s.where(rows % 3 != 2, -1) for s in slots]).to(device),
        storages=storages,
        caches=caches,
        is_neox=is_neox,
    )


def truth(case: Case) -> list[torch.Tensor]:
    """What `Case.written` should be, in 64 bits: each layer [rows, heads, 2*D]."""
    k, v = reference_context_kv(
        case.kv.double(), case.weight.double(), case.eps, case.cos_sin.double(), case.is_neox, case.positions
    )
    both = torch.cat((k, v), -1)
    return [both[case.slots[group, : both.shape[0]] >= 0, layer] for layer, group in enumerate(case.caches.groups)]


def assert_true(case: Case, factor: float = 8.0) -> None:
    """Keys and values of every layer for themselves: a layer of small numbers must not hide behind a large one."""
    got = case.inject()
    reference_inject_context_kv(*case.arguments())
    baseline = case.written()
    for layer, expected in enumerate(truth(case)):
        for name, columns in (("k", slice(None, expected.shape[-1] // 2)), ("v", slice(expected.shape[-1] // 2, None))):
            scales = case.caches.k_scales if name == "k" else case.caches.v_scales
            parts = [part[layer][..., columns] for part in (got, baseline)]
            true = expected[..., columns] / (scales[layer] if scales else 1.0)
            if scales:  # torch does no arithmetic in fp8; bf16 holds all of its numbers
                true, parts = true.clamp(-448, 448), [part.to(torch.bfloat16) for part in parts]
            assert_as_close_as_baseline(f"{name} of layer {layer}", parts[0], true, parts[1], factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rotary", "is_neox"), [(16, True), (16, False), (10, True), (10, False)])
def test_any_dtype_and_rotation(device: str, dtype: torch.dtype, rotary: int, is_neox: bool) -> None:
    assert_true(random_case(device, dtype, rotary=rotary, is_neox=is_neox))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(device: str, layout) -> None:
    case = random_case(device, torch.bfloat16, layouts=(layout, layout, layout))
    assert case.caches.is_aligned == (layout is not unaligned)
    assert_true(case)


@pytest.mark.parametrize("cos_sin_dtype", [torch.bfloat16, torch.float16])
def test_angles_in_the_models_dtype(device: str, cos_sin_dtype: torch.dtype) -> None:
    assert_true(random_case(device, torch.bfloat16, cos_sin_dtype=cos_sin_dtype))


@pytest.mark.parametrize(("heads", "head_size", "rotary"), [(1, 8, 8), (5, 24, 12), (4, 20, 20)])
def test_sizes_that_are_no_powers_of_two(device: str, heads: int, head_size: int, rotary: int) -> None:
    assert_true(random_case(device, torch.float32, heads=heads, head_size=head_size, rotary=rotary))


@pytest.mark.parametrize(("heads", "max_elements"), [(3, 256), (4, 32), (5, 64)])
def test_programs_of_several_rows_or_of_some_heads(
    device: str, monkeypatch: pytest.MonkeyPatch, heads: int, max_elements: int
) -> None:
    """4 rows of 4 heads a program, 2 of 4 heads, 4 of 8; the last program has fewer of both."""
    monkeypatch.setattr(context_kv, "_MANY_ROWS", 2)
    monkeypatch.setattr(context_kv, "_MAX_ELEMENTS", max_elements)
    assert_true(random_case(device, torch.float32, num_rows=9, heads=heads))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [9, 20])
def test_fp8_caches_of_random_numbers(num_rows: int) -> None:
    """Not under the interpreter, which rounds to fp8 wrongly."""
    assert_true(random_case("cuda", torch.bfloat16, FP8, num_rows=num_rows))


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("num_rows", [16, 400])
def test_sizes_of_a_published_drafter(monkeypatch: pytest.MonkeyPatch, num_rows: int, cache_dtype: torch.dtype) -> None:
    monkeypatch.setitem(globals(), "NUM_BLOCKS", 128)
    assert_true(random_case("cuda", torch.bfloat16, cache_dtype, num_rows=num_rows, heads=8, head_size=128, rotary=128))


def test_inputs_are_left_as_they_were(device: str) -> None:
    case = random_case(device, torch.bfloat16)
    before = [value.clone() for value in case.arguments() if isinstance(value, torch.Tensor)]
    case.inject()
    after = [value for value in case.arguments() if isinstance(value, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_shapes_that_do_not_fit_are_an_error(device: str) -> None:
    case = by_hand(device, [[5, 18]], [0, 0], TURNS)
    for change in (
        {"kv": case.kv[:, :12]},
        {"weight": case.weight[:1]},
        {"weight": case.weight.half()},
        {"cos_sin": case.cos_sin[:, :3]},
        {"positions": case.positions[:1]},
        {"slots": case.slots[:, :1]},
    ):
        with pytest.raises(AssertionError):
            inject_context_kv(*replace(case, **change).arguments())


def test_fp8_caches_need_scales(device: str) -> None:
    with pytest.raises(AssertionError, match="scales"):
        make_caches(device, FP8, [(1, 4, 4)], [0], [contiguous])
