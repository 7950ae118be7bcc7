# SPDX-License-Identifier: Apache-2.0
"""Training masks of both kinds: the tiles of the flex one, what it computes, and what a draft model lets through.

A CPU runs flex attention eagerly and asks the rule of every pair; only a GPU's kernel goes by tiles. So tiles are
checked here as the kernel reads them, and the rest by running a small draft model.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from tests.helpers import drafter
from vllm_dflash.config import LayerAttention
from vllm_dflash.hf import DFlashDraftModel
from vllm_dflash.hf.masks import attention, narrowed, visible
from vllm_dflash.training.anchors import block_positions
from vllm_dflash.training.flex_masks import attention_mask_for, flex_block_mask
from vllm_dflash.training.masks import block_mask

pytestmark = pytest.mark.usefixtures("one_thread")

HIDDEN, FEATURES, BLOCK = 48, 96, 4
TILE = 128
RULES = {
    "full": None,
    "window": LayerAttention(sliding_window=40, causal=False),
    "causal window": LayerAttention(sliding_window=40, causal=True),
    "causal": LayerAttention(sliding_window=None, causal=True),
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "use_sliding_window": True}
DRAFTERS = {
    "full": {},
    "sliding causal": SLIDING,
    "sliding": SLIDING | {"dflash_config": {"causal": False}},
    "causal": {"dflash_config": {"causal": True}},
}
MASKS = {"dense": block_mask, "flex": flex_block_mask}


def random_anchors(context: int, blocks: int, seed: int) -> Tensor:
    """Anchors of two sequences, [2, blocks]. The second's last two are invalid: those stand at 0."""
    anchors = torch.randint(0, context - 1, (2, blocks), generator=torch.Generator().manual_seed(seed))
    anchors[1, -2:] = 0
    return anchors


def positions(anchors: Tensor, context: int, block: int) -> Tensor:
    return torch.cat((torch.arange(context).expand(len(anchors), -1), block_positions(anchors, block)), dim=1)


# Tiles.


def spread(tiles: Tensor, shape: torch.Size) -> Tensor:
    """A map of tiles [.., row tiles, key tiles] as one of rows and keys."""
    return tiles.repeat_interleave(TILE, -2).repeat_interleave(TILE, -1)[..., : shape[-2], : shape[-1]]


def listed(counts: Tensor, order: Tensor) -> Tensor:
    """The map of tiles that counts and lists stand for."""
    first = torch.arange(order.shape[-1]) < counts[..., None]
    return torch.zeros_like(first).scatter(-1, order.long(), first)


def as_kernels_read(mask: BlockMask, batch: int) -> Tensor:
    """Who may attend to whom, bool [B, 1, rows, keys], by a kernel that asks the rule in partial tiles only."""
    partial = spread(listed(mask.kv_num_blocks, mask.kv_indices), mask.shape)
    ruled = create_mask(mask.mask_mod, batch, 1, *mask.shape[-2:], device="cpu")
    if mask.full_kv_num_blocks is None:
        return partial & ruled
    return (partial & ruled) | spread(listed(mask.full_kv_num_blocks, mask.full_kv_indices), mask.shape)


SIZES = [(300, 20, 16), (256, 16, 16), (500, 3, 5), (40, 70, 4), (129, 1, 128), (260, 2, 150)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("context", "blocks", "block"), SIZES)
def test_tiles_and_rule_together_are_the_dense_mask(context: int, blocks: int, block: int, rule: str):
    anchors, layer = random_anchors(context, blocks + 2, seed=blocks), RULES[rule]
    expected = block_mask(anchors, context, block)
    if layer is not None:
        where = positions(anchors, context, block)
        expected = expected & visible(layer, where[:, context:], where)
    mask = flex_block_mask(anchors, context, block, sliding=layer)
    assert mask.shape == (2, 1, (blocks + 2) * block, context + (blocks + 2) * block)
    assert torch.equal(as_kernels_read(mask, batch=2), expected)


def test_no_tile_is_read_in_vain_and_no_rule_asked():
    """The same tiles as those that torch finds by way of a dense mask. The last tile of the rows is not a whole one."""
    anchors = random_anchors(600, 26, seed=3).sort(dim=1).values
    anchors[0, :8] = TILE  # the rows of the first tile see one whole tile and nothing of the next
    mask = flex_block_mask(anchors, 600, 16)
    expected = create_block_mask(mask.mask_mod, 2, 1, *mask.shape[-2:], device="cpu")
    assert torch.equal(mask.to_dense(), expected.to_dense())
    whole, expected_whole = (listed(found.full_kv_num_blocks, found.full_kv_indices) for found in (mask, expected))
    assert torch.equal(whole, expected_whole)
    assert whole[0, 0, 0].tolist() == [True] + [False] * 7


def test_a_window_skips_tiles():
    anchors = torch.arange(500, 596, 4)[None]  # all blocks far behind most of the context
    layer = LayerAttention(sliding_window=40, causal=True)
    tiles = flex_block_mask(anchors, 600, 16, sliding=layer).to_dense()
    assert tiles[0, 0, 0, :3].tolist() == [0, 0, 0]
    assert flex_block_mask(anchors, 600, 16).to_dense()[0, 0, 0, :3].tolist() == [1, 1, 1]


def test_a_rule_twice_is_the_rule():
    anchors, layer = random_anchors(300, 20, seed=1), RULES["causal window"]
    where = positions(anchors, 300, 16)
    once = flex_block_mask(anchors, 300, 16, sliding=layer)
    twice = narrowed(once, layer, where[:, 300:], where)
    assert torch.equal(as_kernels_read(twice, 2), as_kernels_read(once, 2))


def test_anchor_behind_the_context_sees_no_other_block():
    anchors = torch.tensor([[9, 12]])
    assert torch.equal(as_kernels_read(flex_block_mask(anchors, 8, 4), 1), block_mask(anchors, 8, 4))


def test_the_cpu_gets_a_dense_mask():
    anchors, layer = random_anchors(30, 5, seed=0), LayerAttention(sliding_window=6, causal=True)
    assert torch.equal(attention_mask_for("cpu", anchors, 30, 4), block_mask(anchors, 30, 4))
    narrow = attention_mask_for(torch.device("cpu"), anchors, 30, 4, sliding=layer)
    assert torch.equal(narrow, as_kernels_read(flex_block_mask(anchors, 30, 4, sliding=layer), 2))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", DRAFTERS)
def test_cuda_kernels_give_what_the_dense_mask_does(kind: str):
    model, anchors = drafter(block_size=16, **DRAFTERS[kind]).cuda(), random_anchors(300, 20, seed=2).cuda()
    mask = attention_mask_for("cuda", anchors, 300, 16)
    assert isinstance(mask, BlockMask)
    compare(model, anchors, mask, 300, 16, atol=2e-3)  # kernels may multiply in tf32


# A draft model with either mask.


def inputs(anchors: Tensor, context: int, block: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "noise_embedding": torch.randn(len(anchors), anchors.shape[1] * block, HIDDEN, generator=generator),
        "target_hidden": torch.randn(len(anchors), context, FEATURES, generator=generator),
        "position_ids": positions(anchors.cpu(), context, block),
    }
    return {name: tensor.to(anchors.device) for name, tensor in tensors.items()}


def forward_and_gradients(
    model: DFlashDraftModel, mask: Tensor | BlockMask, given: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Hidden states, and the gradients of every weight and input."""
    leaves = {name: given[name].clone().requires_grad_() for name in ("noise_embedding", "target_hidden")}
    model.zero_grad()
    hidden = model(position_ids=given["position_ids"], attention_mask=mask, **leaves)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(9)).to(hidden.device)
    (hidden * weights).sum().backward()
    gradients = {name: leaf.grad for name, leaf in (*model.named_parameters(), *leaves.items())}
    return {"hidden": hidden.detach()} | {name: grad.clone() for name, grad in gradients.items()}


def compare(model: DFlashDraftModel, anchors: Tensor, mask: BlockMask, context: int, block: int, atol: float) -> None:
    given = inputs(anchors, context, block)
    dense = forward_and_gradients(model, block_mask(anchors, context, block), given)
    for name, found in forward_and_gradients(model, mask, given).items():
        scale = dense[name].abs().max().item()
        torch.testing.assert_close(found, dense[name], rtol=0, atol=atol * max(1.0, scale), msg=lambda m, n=name: n + m)


@pytest.fixture
def backward_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager implementation has a backward; only the front door refuses it on a CPU, for want of a kernel."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda query, key, value: None)


@pytest.mark.parametrize("kind", DRAFTERS)
def test_flex_gives_what_dense_does(kind: str, backward_on_cpu: None):
    model, anchors = drafter(block_size=BLOCK, **DRAFTERS[kind]), random_anchors(14, 5, seed=4)
    compare(model, anchors, flex_block_mask(anchors, 14, BLOCK), 14, BLOCK, atol=1e-5)


def test_flex_runs_under_autocast():
    model, anchors = drafter(block_size=BLOCK, **SLIDING), random_anchors(14, 5, seed=4)
    given = inputs(anchors, 14, BLOCK)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        flex, dense = (model(attention_mask=mask(anchors, 14, BLOCK), **given) for mask in MASKS.values())
    torch.testing.assert_close(flex, dense, atol=0.1, rtol=0.1)


def test_mixed_precision_becomes_that_of_the_values():
    query, value = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 12, 16)
    mask = flex_block_mask(torch.tensor([[2, 3]]), 4, 4)
    mixed = attention(query, value, value.bfloat16(), mask)
    assert torch.equal(mixed, attention(query.bfloat16(), value.bfloat16(), value.bfloat16(), mask))


def test_a_compiled_model_takes_a_flex_mask():
    """Traced only; what kernels make of it, a GPU tells."""
    model, anchors = drafter(block_size=BLOCK, **SLIDING), random_anchors(14, 5, seed=4)
    given, mask = inputs(anchors, 14, BLOCK), flex_block_mask(anchors, 14, BLOCK)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(attention_mask=mask, **given)
        torch.testing.assert_close(compiled, model(attention_mask=mask, **given))


# Perturbation: change one input, and see which blocks' rows answer.


def answers(model: DFlashDraftModel, make_mask: Callable[..., Tensor | BlockMask], anchors: Tensor, context: int):
    """Which blocks change with which feature, bool [T, N], and with which row, bool [N*Q, N]. One sequence: [N]."""
    rows = len(anchors) * BLOCK
    variants = anchors.expand(1 + context + rows, -1)  # unchanged; each feature changed; each row changed
    given = inputs(anchors[None], context, BLOCK)
    features = given["target_hidden"].repeat(len(variants), 1, 1)
    noise = given["noise_embedding"].repeat(len(variants), 1, 1)
    features[torch.arange(1, 1 + context), torch.arange(context)] += 3.0
    noise[torch.arange(1 + context, len(variants)), torch.arange(rows)] += 3.0
    with torch.no_grad():
        hidden = model(
            position_ids=given["position_ids"].expand(len(variants), -1),
            noise_embedding=noise,
            target_hidden=features,
            attention_mask=make_mask(variants, context, BLOCK),
        )
    changed = (hidden[1:] - hidden[:1]).abs().unflatten(1, (-1, BLOCK)).amax(dim=(2, 3)) > 1e-4
    return changed[:context], changed[context:]


def leaks(features: Tensor, rows: Tensor, anchors: Tensor) -> list[tuple[str, int, int]]:
    """What reaches a block that must not know it: a feature at or behind its anchor, or another block."""
    behind = features & (torch.arange(len(features))[:, None] >= anchors)
    foreign = rows & (torch.arange(len(rows))[:, None] // BLOCK != torch.arange(len(anchors)))
    found = [("feature", *place) for place in behind.nonzero().tolist()]
    return found + [("row", *place) for place in foreign.nonzero().tolist()]


@pytest.mark.parametrize("path", MASKS)
@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_reaches_a_block_that_must_not(path: str, kind: str, seed: int):
    model = drafter(block_size=BLOCK, **DRAFTERS[kind])
    anchors = random_anchors(9, 5, seed)[1]  # the last two are invalid
    features, rows = answers(model, MASKS[path], anchors, context=9)
    assert leaks(features, rows, anchors) == []
    own = torch.arange(len(rows))[:, None] // BLOCK == torch.arange(len(anchors))
    assert torch.equal(rows, own)
    assert torch.equal(features, torch.arange(9)[:, None] < anchors)  # each drafter has a layer without a window


@pytest.mark.parametrize("path", MASKS)
def test_leaks_are_found(path: str):
    model, anchors = drafter(block_size=BLOCK), torch.tensor([3, 6, 0])

    def one_feature_too_many(anchors: Tensor, context: int, block: int) -> Tensor | BlockMask:
        return MASKS[path](anchors + 1, context, block)

    def blocks_of_two(anchors: Tensor, context: int, block: int) -> Tensor | BlockMask:
        return MASKS[path](anchors[:, ::2], context, 2 * block)

    found = leaks(*answers(model, one_feature_too_many, anchors, 9), anchors)
    assert found == [("feature", 0, 2), ("feature", 3, 0), ("feature", 6, 1)]
    anchors = torch.tensor([3, 3, 6, 6])
    found = leaks(*answers(model, blocks_of_two, anchors, 9), anchors)
    assert found == [("row", row, (row // BLOCK) ^ 1) for row in range(4 * BLOCK)]
