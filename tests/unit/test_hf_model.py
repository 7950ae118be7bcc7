# SPDX-License-Identifier: Apache-2.0
"""The Transformers draft model against an independent statement of one forward, in loops and in double precision."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.helpers import ABSENT, drafter, drafter_config, speculators_config, write_config, write_drafter
from vllm_dflash.hf import DFlashDraftModel

pytestmark = pytest.mark.usefixtures("one_thread")

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, EPS = 48, 4, 2, 32, 1e-6
TAPS, BLOCK = 2, 4
#: fp32 against double: some hundred roundings of values around 1. A wrong rule is off by more than WRONG.
CLOSE, WRONG = {"atol": 2e-5, "rtol": 2e-5}, 1e-2


# The statement. One request, no batch, no cache; every row's keys are looked up one by one.


@dataclass(frozen=True)
class Rules:
    """What config.json says beyond the sizes."""

    window: tuple[int | None, ...] = (None, None)  # of each layer
    causal: tuple[bool, ...] = (False, False)
    rotary_dim: int = HEAD_DIM
    theta: float = 10000.0
    scaling: float = 1.0  # linear RoPE scaling: positions are divided by it
    heads: int = HEADS
    kv_heads: int = KV_HEADS


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + EPS).sqrt() * weight


def turn(x: Tensor, position: int, rules: Rules) -> Tensor:
    """RoPE of one head vector: channels i and i + rotary_dim/2 are a pair, turned by position * theta^(-2i/dim)."""
    half, out = rules.rotary_dim // 2, x.clone()
    for i in range(half):
        angle = position / rules.scaling * rules.theta ** (-2 * i / rules.rotary_dim)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def sees(query: int, key: int, window: int | None, causal: bool) -> bool:
    """Whether a block row at position `query` attends to the row at position `key`."""
    if causal and key > query:
        return False
    return window is None or abs(query - key) < window


def attention(
    weights: dict[str, Tensor],
    rules: Rules,
    layer: int,
    block: list[Tensor],  # normed states of the block rows
    context: list[Tensor],  # context states
    positions: list[int],  # of the context rows, then of the block rows
) -> list[Tensor]:
    def project(kind: str, x: Tensor) -> list[Tensor]:
        out = weights[f"layers.{layer}.self_attn.{kind}_proj.weight"] @ x
        bias = weights.get(f"layers.{layer}.self_attn.{kind}_proj.bias")
        return list((out if bias is None else out + bias).split(HEAD_DIM))

    def norm(kind: str, x: Tensor) -> Tensor:
        return rms_norm(x, weights[f"layers.{layer}.self_attn.{kind}_norm.weight"])

    rows = context + block
    keys = [
        [turn(norm("k", head), position, rules) for head in project("k", row)]
        for row, position in zip(rows, positions, strict=True)
    ]
    values = [project("v", row) for row in rows]
    outputs, rule = [], (rules.window[layer], rules.causal[layer])
    for row, position in zip(block, positions[len(context) :], strict=True):
        heads = []
        for index, head in enumerate(project("q", row)):
            query, kv_head = turn(norm("q", head), position, rules), index // (rules.heads // rules.kv_heads)
            seen = [j for j, other in enumerate(positions) if sees(position, other, *rule)]
            scores = torch.stack([query @ keys[j][kv_head] / math.sqrt(HEAD_DIM) for j in seen]).exp()
            heads.append(sum(score / scores.sum() * values[j][kv_head] for score, j in zip(scores, seen, strict=True)))
        out = weights[f"layers.{layer}.self_attn.o_proj.weight"] @ torch.cat(heads)
        bias = weights.get(f"layers.{layer}.self_attn.o_proj.bias")
        outputs.append(out if bias is None else out + bias)
    return outputs


def statement(
    weights: dict[str, Tensor],
    rules: Rules,
    features: Tensor,  # [T, F*H] of all context rows
    noise: Tensor,  # [Q, H] embeddings of the block rows
    positions: list[int],  # T + Q
) -> Tensor:
    """Hidden states of the block rows [Q, H], by the paper's section 3."""
    context = [rms_norm(weights["fc.weight"] @ row, weights["hidden_norm.weight"]) for row in features]
    states = list(noise)
    for layer in range(len(rules.window)):
        prefix = f"layers.{layer}"
        normed = [rms_norm(row, weights[f"{prefix}.input_layernorm.weight"]) for row in states]
        added = attention(weights, rules, layer, normed, context, positions)
        states = [row + more for row, more in zip(states, added, strict=True)]
        for index, row in enumerate(states):
            normed_row = rms_norm(row, weights[f"{prefix}.post_attention_layernorm.weight"])
            gate = weights[f"{prefix}.mlp.gate_proj.weight"] @ normed_row
            up = weights[f"{prefix}.mlp.up_proj.weight"] @ normed_row
            states[index] = row + weights[f"{prefix}.mlp.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up)
    return torch.stack([rms_norm(row, weights["norm.weight"]) for row in states])


# The comparison.


def small_drafter(**changes: Any) -> DFlashDraftModel:
    return drafter(block_size=BLOCK, **changes)


def inputs(num_context: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Features [T, F*H] and block embeddings [Q, H]."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(num_context, TAPS * HIDDEN, generator=generator),
        torch.randn(BLOCK, HIDDEN, generator=generator),
    )


def stated(model: DFlashDraftModel, rules: Rules, features: Tensor, noise: Tensor, first: int = 0) -> Tensor:
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    positions = list(range(first, first + len(features) + BLOCK))
    return statement(weights, rules, features.double(), noise.double(), positions)


def computed(model: DFlashDraftModel, features: Tensor, noise: Tensor, first: int = 0) -> Tensor:
    with torch.no_grad():
        return model(
            position_ids=torch.arange(first, first + len(features) + BLOCK)[None],
            noise_embedding=noise[None],
            target_hidden=features[None],
        )[0]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, **CLOSE)


SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3, "use_sliding_window": True}
CASES = {
    # name: (changes of the config, the rules they mean, a plausible misreading)
    "full attention": ({}, Rules(), Rules(causal=(True, True))),
    "sliding causal layer": (
        SLIDING,
        Rules(window=(3, None), causal=(True, False)),
        Rules(window=(3, None), causal=(False, False)),
    ),
    "sliding bidirectional layer": (
        SLIDING | {"dflash_config": {"causal": False}},
        Rules(window=(3, None)),
        Rules(window=(2, None)),
    ),
    "causal full layers": ({"dflash_config": {"causal": True}}, Rules(causal=(True, True)), Rules()),
    "attention bias": ({"attention_bias": True}, Rules(), Rules(causal=(True, True))),
    "partial rotary": (
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}},
        Rules(rotary_dim=16),
        Rules(rotary_dim=32),
    ),
    "other theta": ({"rope_theta": 100.0}, Rules(theta=100.0), Rules()),
    "linear RoPE scaling": (
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}},
        Rules(scaling=4.0),
        Rules(),
    ),
    "one key head for all": ({"num_key_value_heads": 1}, Rules(kv_heads=1), Rules(kv_heads=1, causal=(True, True))),
    "a key head each": ({"num_key_value_heads": 4}, Rules(kv_heads=4), Rules(kv_heads=4, causal=(True, True))),
}


def test_frequencies_are_computed_once() -> None:
    """A second forward copies nothing from the host."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    rotary = drafter(rope_theta=ABSENT, rope_parameters=yarn).rotary_emb
    first, _ = rotary._frequencies(torch.device("cpu"))
    assert rotary._frequencies(torch.device("cpu"))[0] is first


@pytest.mark.parametrize("case", CASES)
def test_forward_is_the_stated_one(case: str) -> None:
    changes, rules, misread = CASES[case]
    model = small_drafter(**changes)
    features, noise = inputs(num_context=5)
    actual = computed(model, features, noise)
    assert_close(actual, stated(model, rules, features, noise))
    assert (actual - stated(model, misread, features, noise)).abs().max() > WRONG


def test_biases_take_part() -> None:
    model = small_drafter(attention_bias=True)
    features, noise = inputs(num_context=5)
    before = computed(model, features, noise)
    for kind in ("q", "k", "v", "o"):
        changed = small_drafter(attention_bias=True)
        changed.get_parameter(f"layers.1.self_attn.{kind}_proj.bias").data.zero_()
        assert (computed(changed, features, noise) - before).abs().max() > WRONG, kind


def test_every_layer_norms_keys_with_its_own_weight() -> None:
    model = small_drafter()
    model.layers[0].self_attn.k_norm.weight.data.mul_(0.05)
    model.layers[1].self_attn.k_norm.weight.data.mul_(4.0)
    features, noise = inputs(num_context=5)
    assert_close(computed(model, features, noise), stated(model, Rules(), features, noise))


def test_rows_far_from_position_0() -> None:
    model = small_drafter()
    features, noise = inputs(num_context=5)
    actual = computed(model, features, noise, first=200)
    # The angles themselves are only good to fp32 here: 200 * 6e-8 radians.
    torch.testing.assert_close(
        actual.double(), stated(model, Rules(), features, noise, first=200), atol=2e-4, rtol=2e-4
    )


@pytest.mark.parametrize("changes", [{}, SLIDING], ids=["full", "sliding"])
def test_two_rounds_with_a_cache_equal_one_without(changes: dict[str, Any]) -> None:
    model, cache = small_drafter(**changes), DynamicCache()
    features, first_noise = inputs(num_context=7)
    second_noise = inputs(num_context=0, seed=2)[1]
    for start, end, noise in ((0, 4, first_noise), (4, 7, second_noise)):
        with torch.no_grad():
            actual = model(
                position_ids=torch.arange(start, end + BLOCK)[None],
                noise_embedding=noise[None],
                target_hidden=features[None, start:end],
                past_key_values=cache,
            )[0]
        assert_close(actual, computed(model, features[:end], noise).double())
        assert cache.get_seq_length() == end + BLOCK
        cache.crop(-BLOCK)


def test_rows_of_a_batch_do_not_meet() -> None:
    model = small_drafter()
    pairs = [inputs(num_context=5, seed=seed) for seed in (1, 2)]
    with torch.no_grad():
        together = model(
            position_ids=torch.arange(5 + BLOCK).expand(2, -1),
            noise_embedding=torch.stack([noise for _, noise in pairs]),
            target_hidden=torch.stack([features for features, _ in pairs]),
        )
    for row, (features, noise) in zip(together, pairs, strict=True):
        assert_close(row, computed(model, features, noise).double())


def test_masked_context_rows_are_as_if_absent() -> None:
    model = small_drafter()
    features, noise = inputs(num_context=5)
    mask = torch.ones(1, 1, BLOCK, 5 + BLOCK, dtype=torch.bool)
    mask[..., :2] = False
    with torch.no_grad():
        actual = model(
            position_ids=torch.arange(5 + BLOCK)[None],
            noise_embedding=noise[None],
            target_hidden=features[None],
            attention_mask=mask,
        )[0]
    assert_close(actual, stated(model, Rules(), features[2:], noise, first=2))


# Checkpoints.


@pytest.mark.parametrize("changes", [{}, SLIDING, {"attention_bias": True}], ids=["full", "sliding", "bias"])
def test_a_saved_drafter_comes_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = small_drafter(**changes)
    model.save_pretrained(tmp_path)
    loaded = DFlashDraftModel.from_pretrained(str(tmp_path))
    features, noise = inputs(num_context=5)
    assert torch.equal(computed(loaded, features, noise), computed(model, features, noise))
    assert (loaded.block_size, loaded.mask_token_id, loaded.target_layer_ids) == (BLOCK, 95, (1, 3))


def test_a_saved_drafter_with_scaled_rope_comes_back(tmp_path: Path) -> None:
    rope = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}
    model = drafter(block_size=BLOCK, rope_parameters=rope)
    model.save_pretrained(tmp_path)
    features, noise = inputs(num_context=5)
    loaded = DFlashDraftModel.from_pretrained(str(tmp_path))
    assert torch.equal(computed(loaded, features, noise), computed(model, features, noise))


def test_shards_are_one_model(tmp_path: Path) -> None:
    model = small_drafter()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    features, noise = inputs(num_context=5)
    loaded = DFlashDraftModel.from_pretrained(str(tmp_path))
    assert torch.equal(computed(loaded, features, noise), computed(model, features, noise))


def test_speculators_layout_is_the_same_model(tmp_path: Path) -> None:
    model = small_drafter()
    model.save_pretrained(tmp_path)
    write_config(tmp_path, speculators_config(block_size=BLOCK))
    features, noise = inputs(num_context=5)
    loaded = DFlashDraftModel.from_pretrained(str(tmp_path))
    assert torch.equal(computed(loaded, features, noise), computed(model, features, noise))


def test_bfloat16_keeps_its_rotation_exact(tmp_path: Path) -> None:
    """Frequencies rounded to bfloat16 would turn a row at position 200 by up to half a radian too much."""
    loaded = DFlashDraftModel.from_pretrained(str(write_drafter(tmp_path)), dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    for model in (loaded, drafter().to(torch.bfloat16)):
        cos, sin = model.rotary_emb(torch.tensor([[200]]), torch.float32)
        angles = [200 * 10000.0 ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)] * 2
        assert cos.flatten().tolist() == pytest.approx([math.cos(angle) for angle in angles], abs=1e-4)
        assert sin.flatten().tolist() == pytest.approx([math.sin(angle) for angle in angles], abs=1e-4)


def test_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    write_drafter(tmp_path)
    write_config(tmp_path, drafter_config(num_hidden_layers=3))
    with pytest.raises(ValueError, match="missing tensor.*layers.2.input_layernorm.weight"):
        DFlashDraftModel.from_pretrained(str(tmp_path))


def test_gptj_style_rope_is_refused() -> None:
    with pytest.raises(ValueError, match="is_neox_style = false is not supported"):
        drafter(is_neox_style=False)


# Tables of its own.


def target_with_tables(embedding: Tensor, head: Tensor) -> Any:
    """As much of a target as the drafter asks of it."""

    class Target:
        def get_input_embeddings(self) -> Any:
            return lambda ids: embedding[ids]

        def get_output_embeddings(self) -> Any:
            return lambda states: states @ head.T

    return Target()


def test_without_own_tables_the_targets_are_used() -> None:
    embedding, head = torch.randn(96, HIDDEN), torch.randn(96, HIDDEN)
    model, target = small_drafter(), target_with_tables(embedding, head)
    ids, states = torch.tensor([[3, 95, 95]]), torch.randn(1, 2, HIDDEN)
    assert torch.equal(model.embed(ids, target), embedding[ids])
    torch.testing.assert_close(model.draft_logits(states, target), states @ head.T)


def test_own_tables_come_back_and_are_used(tmp_path: Path) -> None:
    saved = small_drafter(own_tensors=["embed_tokens.weight", "lm_head.weight"])
    saved.save_pretrained(tmp_path)
    model = DFlashDraftModel.from_pretrained(str(tmp_path))
    target = target_with_tables(torch.zeros(96, HIDDEN), torch.zeros(96, HIDDEN))
    ids, states = torch.tensor([[3, 95, 95]]), torch.randn(1, 2, HIDDEN)
    with torch.no_grad():
        assert torch.equal(model.embed(ids, target), saved.state_dict()["embed_tokens.weight"][ids])
        torch.testing.assert_close(model.draft_logits(states, target), states @ saved.state_dict()["lm_head.weight"].T)


def test_reduced_vocabulary_maps_to_target_ids(tmp_path: Path) -> None:
    """d2t holds offsets: draft id i is target id i + d2t[i]. Ids outside the draft vocabulary can never be drafted."""
    saved = small_drafter(draft_vocab_size=4, own_tensors=["lm_head.weight", "d2t"])
    saved.d2t.copy_(torch.tensor([2, 2, 5, 92]))  # target ids 2, 3, 7, 95
    saved.save_pretrained(tmp_path)
    model = DFlashDraftModel.from_pretrained(str(tmp_path), dtype=torch.bfloat16).float()
    assert model.d2t.dtype == torch.long
    states = torch.randn(1, 1, HIDDEN)
    with torch.no_grad():
        logits = model.draft_logits(states, target_with_tables(torch.zeros(96, HIDDEN), torch.zeros(96, HIDDEN)))
    assert logits.shape == (1, 1, 96)
    assert logits.isfinite().flatten().nonzero().flatten().tolist() == [2, 3, 7, 95]
    torch.testing.assert_close(logits[..., [2, 3, 7, 95]], states @ model.lm_head.weight.T)


def test_mask_embedding_replaces_the_mask_rows_only(tmp_path: Path) -> None:
    write_drafter(tmp_path, block_size=BLOCK)
    mask_row = torch.arange(HIDDEN) / 7
    torch.save({"embedding": mask_row, "mask_token_id": 95}, tmp_path / "mask_embedding.pt")
    model = DFlashDraftModel.from_pretrained(str(tmp_path))
    embedding = torch.randn(96, HIDDEN)
    embeds = model.embed(torch.tensor([[3, 95, 94, 95]]), target_with_tables(embedding, embedding))
    assert torch.equal(embeds[0], torch.stack([embedding[3], mask_row, embedding[94], mask_row]))


def test_saved_config_is_the_published_layout(tmp_path: Path) -> None:
    raw = json.loads((write_drafter(tmp_path, **SLIDING) / "config.json").read_text(encoding="utf-8"))
    assert raw["architectures"] == ["DFlashDraftModel"]
    assert (raw["block_size"], raw["num_target_layers"]) == (16, 6)
    assert raw["dflash_config"] == {"mask_token_id": 95, "target_layer_ids": [1, 3]}
    assert (raw["layer_types"], raw["sliding_window"]) == (["sliding_attention", "full_attention"], 3)
