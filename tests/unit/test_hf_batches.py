# SPDX-License-Identifier: Apache-2.0
"""spec_generate in batches and with trees, over families of targets: its text is `target.generate`'s.

Random drafters are never right, so drafts are planted: right tokens among decoys, so that an accepted way has gaps
between its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch
from transformers import BatchEncoding, PreTrainedModel, TextStreamer

from tests.helpers import drafter, planted_tree, randomise, target, target_config
from vllm_dflash.hf import SpecGenerateOutput
from vllm_dflash.hf import round as round_
from vllm_dflash.hf.calibration import Calibration
from vllm_dflash.hf.slot_cache import SlotCache

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK, VOCAB, PAD = 5, 96, 0
PROMPTS = [[5, 9, 2, 40, 7, 33, 21], [81, 3], [17, 17, 60, 4]]
WIDTH = max(map(len, PROMPTS))
LEFT = torch.tensor([[PAD] * (WIDTH - len(ids)) + ids for ids in PROMPTS])
LEFT_MASK = torch.tensor([[0] * (WIDTH - len(ids)) + [1] * len(ids) for ids in PROMPTS])


def qwen3() -> PreTrainedModel:
    return target()


def llama() -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    return randomise(LlamaForCausalLM(LlamaConfig(**_shape())))


def mistral_sliding() -> PreTrainedModel:
    from transformers import MistralConfig, MistralForCausalLM

    return randomise(MistralForCausalLM(MistralConfig(**_shape(), sliding_window=3)))


def qwen3_moe() -> PreTrainedModel:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return randomise(Qwen3MoeForCausalLM(Qwen3MoeConfig(**_shape(), **experts)))


def gpt_oss() -> PreTrainedModel:
    from transformers import GptOssConfig, GptOssForCausalLM

    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 3, "rope_parameters": None}
    return randomise(GptOssForCausalLM(GptOssConfig(**(_shape() | experts), attn_implementation="eager")))


def gemma3() -> PreTrainedModel:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"] * 3
    more = {"sliding_window": 3, "layer_types": kinds, "query_pre_attn_scalar": 32}
    return randomise(Gemma3ForCausalLM(Gemma3TextConfig(**_shape(), **more)))


def _shape() -> dict[str, Any]:
    keys = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "vocab_size", "max_position_embeddings",
    )  # fmt: skip
    raw = target_config()
    return {key: raw[key] for key in keys} | {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None}


FAMILIES = [qwen3, llama, mistral_sliding, qwen3_moe, gpt_oss, gemma3]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.param().eval()


def greedy(model: PreTrainedModel, num_tokens: int) -> torch.Tensor:
    """[3, WIDTH + num_tokens]: what `generate` gives for the batch."""
    return model.generate(
        LEFT, attention_mask=LEFT_MASK, do_sample=False, max_new_tokens=num_tokens, pad_token_id=PAD, eos_token_id=None
    )


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[tuple[int, int], list[int]]]:
    """Plant `counts` right drafts a round, in turn, the turn of each row being one later than that of the row above.

    Returns a record of what the drafter really drafted, by row and number of tokens so far.
    """
    real = round_.draft

    def patch(texts: list[list[int]], counts: list[int], decoys: bool) -> dict[tuple[int, int], list[int]]:
        seen: dict[tuple[int, int], list[int]] = {}
        turns = [cycle(counts[row % len(counts) :] + counts[: row % len(counts)]) for row in range(len(texts))]

        def planted(draft, target, state, *rest):
            drafted = real(draft, target, state, *rest)  # keeps the draft cache as it would be
            right = []
            for row, length in enumerate(state.lengths.tolist()):
                seen.setdefault((row, length + 1), drafted.tree.token_ids[row].tolist())
                done = length + 1 - len(PROMPTS[row])
                wanted = (texts[row] + [0] * BLOCK)[done : done + BLOCK - 1]
                count = next(turns[row])
                right.append([*wanted[:count], *((token + 2) % VOCAB for token in wanted[count:])])
            return replace(drafted, tree=planted_tree(right, decoys))

        monkeypatch.setattr(round_, "draft", planted)
        return seen

    return patch


def generate(model: PreTrainedModel, max_new_tokens: int, **options: Any) -> SpecGenerateOutput:
    options = {"attention_mask": LEFT_MASK} | options
    return drafter(block_size=BLOCK).spec_generate(LEFT, model, max_new_tokens, return_stats=True, **options)


COUNTS = [4, 0, 2, 3, 1]


@pytest.mark.parametrize("tree_budget", [None, 2 * (BLOCK - 1)], ids=["chain", "tree"])
def test_a_ragged_batch_says_what_generate_says(model: PreTrainedModel, plant: Callable, tree_budget: int) -> None:
    expected = greedy(model, 26 + BLOCK)
    texts = expected[:, WIDTH:].tolist()
    assert all(len(set(text)) > 4 for text in texts), "a target that says the same all the time"
    plant(texts, COUNTS, decoys=tree_budget is not None)
    output = generate(model, 26, tree_budget=tree_budget)
    assert output.sequences.tolist() == expected[:, : WIDTH + 26].tolist()
    for row, lengths in enumerate(output.acceptance_lengths_by_row):
        turn = cycle(COUNTS[row:] + COUNTS[:row])
        assert lengths == [1 + next(turn) for _ in lengths]
        assert 1 + sum(lengths[:-1]) < 26 <= 1 + sum(lengths)


@pytest.mark.parametrize("tree_budget", [None, 9], ids=["chain", "tree"])
def test_unplanted_drafts_too(model: PreTrainedModel, tree_budget: int | None) -> None:
    expected = greedy(model, 12)
    assert torch.equal(generate(model, 12, tree_budget=tree_budget).sequences, expected)


def test_the_drafter_sees_the_same_whatever_was_accepted_before(plant: Callable) -> None:
    """The draft cache holds accepted context and nothing else, row by row: the next tree must not depend on the way."""
    model = target()
    texts = greedy(model, 30 + BLOCK)[:, WIDTH:].tolist()
    one_by_one = plant(texts, [0], decoys=True)
    generate(model, 30, tree_budget=8)
    in_strides = plant(texts, COUNTS, decoys=True)
    generate(model, 30, tree_budget=8)
    common = one_by_one.keys() & in_strides.keys()
    assert {row for row, _ in common} == {0, 1, 2} and len(common) > 20
    assert {at: one_by_one[at] for at in common} == {at: in_strides[at] for at in common}


def test_no_two_rows_go_to_one_slot(plant: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that share a slot, which one stays depends on the device. Only the spare slot may be shared."""
    placed: list[tuple[SlotCache, list[list[int]]]] = []
    real = SlotCache.place

    def place(cache: SlotCache, slots: torch.Tensor, num_visible: int) -> None:
        placed.append((cache, slots.tolist()))
        real(cache, slots, num_visible)

    monkeypatch.setattr(SlotCache, "place", place)
    model = target()
    plant(greedy(model, 20 + BLOCK)[:, WIDTH:].tolist(), COUNTS, decoys=True)
    generate(model, 20, tree_budget=8)
    assert len(placed) > 10
    for cache, rows in placed:
        for row in rows:
            wanted = [slot for slot in row if slot != cache.spare_slot]
            assert len(set(wanted)) == len(wanted)


def test_padding_on_the_right_is_padding_too() -> None:
    model = target()
    expected = greedy(model, 9)[:, WIDTH:]
    right = torch.tensor([ids + [PAD] * (WIDTH - len(ids)) for ids in PROMPTS])
    mask = torch.tensor([[1] * len(ids) + [0] * (WIDTH - len(ids)) for ids in PROMPTS])
    got = drafter(block_size=BLOCK).spec_generate(right, model, 9, attention_mask=mask)
    assert torch.equal(got, torch.cat((right, expected), dim=1))


@pytest.mark.parametrize("rows", [slice(3), slice(1, 2)], ids=["batch", "one"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_all_rows_have(rows: slice, side: str) -> None:
    """More of it than there is room for in the caches."""
    model, padding = target(), torch.zeros(3, 200, dtype=torch.long)
    expected = greedy(model, 9)[rows, WIDTH:]
    right = torch.tensor([ids + [PAD] * (WIDTH - len(ids)) for ids in PROMPTS])
    right_mask = torch.tensor([[1] * len(ids) + [0] * (WIDTH - len(ids)) for ids in PROMPTS])
    parts = {"left": ([padding, LEFT], [padding, LEFT_MASK]), "right": ([right, padding], [right_mask, padding])}
    ids, mask = (torch.cat(columns, dim=1)[rows] for columns in parts[side])
    got = drafter(block_size=5).spec_generate(ids, model, 9, attention_mask=mask)
    assert torch.equal(got, torch.cat((ids, expected), dim=1))


def test_sliding_windows_in_all_layers_by_their_names(plant: Callable) -> None:
    """`layer_types` of one kind: such models take one mask."""
    model = mistral_sliding().eval()
    model.config.layer_types = ["sliding_attention"] * model.config.num_hidden_layers
    expected = greedy(model, 20 + BLOCK)
    plant(expected[:, WIDTH:].tolist(), COUNTS, decoys=True)
    assert torch.equal(generate(model, 20, tree_budget=8).sequences, expected[:, : WIDTH + 20])


def test_what_a_tokenizer_returns_will_do() -> None:
    model = target()
    encoding = BatchEncoding({"input_ids": LEFT, "attention_mask": LEFT_MASK})
    got = drafter(block_size=BLOCK).spec_generate(input_ids=encoding, max_new_tokens=9, target=model)
    assert torch.equal(got, greedy(model, 9))


@pytest.mark.parametrize("tree_budget", [None, 8], ids=["chain", "tree"])
def test_rows_stop_each_at_their_own_token(plant: Callable, tree_budget: int | None) -> None:
    model = target()
    texts = greedy(model, 20 + BLOCK)[:, WIDTH:].tolist()
    stops = [texts[0][3], texts[1][11]]
    plant(texts, COUNTS, decoys=tree_budget is not None)
    output = generate(model, 20, stop_token_ids=stops, tree_budget=tree_budget)
    expected = []
    for text in texts:
        end = next((i for i, token in enumerate(text[:20]) if token in stops), 19) + 1
        expected.append(text[:end])
    longest = max(map(len, expected))
    assert len({len(text) for text in expected}) > 1
    assert output.sequences[:, WIDTH:].tolist() == [text + [PAD] * (longest - len(text)) for text in expected]


class Recorder(TextStreamer):
    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_is_told_every_token_once(plant: Callable) -> None:
    model, streamer = target(), Recorder()
    texts = greedy(model, 20 + BLOCK)[:, WIDTH:].tolist()
    plant(texts[:1], [3], decoys=False)
    out = drafter(block_size=BLOCK).spec_generate(
        torch.tensor(PROMPTS[:1]), model, 20, streamer=streamer, stop_token_ids=[texts[0][14]]
    )
    assert streamer.ended and streamer.pieces[0] == PROMPTS[0]
    assert sum(streamer.pieces, []) == out[0].tolist()
    assert [len(piece) for piece in streamer.pieces[1:3]] == [1, 4]


# Bad input.


def test_a_row_of_padding() -> None:
    mask = LEFT_MASK.clone()
    mask[1] = 0
    with pytest.raises(ValueError, match=r"rows \[1\]: all of them is padding"):
        generate(target(), 4, attention_mask=mask)


def test_a_mask_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"attention_mask \[3, 6\] is not of input_ids' \[3, 7\]"):
        generate(target(), 4, attention_mask=LEFT_MASK[:, 1:])


def test_a_prompt_beyond_the_targets_positions() -> None:
    model = target(max_position_embeddings=16)
    with pytest.raises(ValueError, match="a prompt of 17 tokens is longer than the target's 16 positions"):
        drafter().spec_generate(torch.ones(1, 17, dtype=torch.long), model, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"vocab_size": 64}, "vocabulary 96, .* has 64"), ({"hidden_size": 32}, "hidden size 48, .* has 32")],
    ids=["vocabulary", "hidden size"],
)
def test_the_drafter_of_another_target(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*another target"):
        drafter().spec_generate(torch.tensor([[1, 2]]), target(**changes), 4)


@pytest.mark.parametrize("budget", [0, -1, 1025, 2.5, True, "all"])
def test_tree_budgets_that_are_none(budget: Any) -> None:
    with pytest.raises(ValueError, match=f"tree_budget must be .*found {budget!r}"):
        generate(target(), 4, tree_budget=budget)


def test_another_mask_token() -> None:
    draft = drafter()
    ids = torch.tensor([[1, 2]])
    assert draft.spec_generate(ids, target(), 2, mask_token_id=95).shape == (1, 4)
    with pytest.raises(ValueError, match="mask_token_id = 94, .* was trained with 95"):
        draft.spec_generate(ids, target(), 2, mask_token_id=94)


def test_a_target_with_recurrent_state() -> None:
    model = target()
    model.config.layer_types = ["linear_attention", "full_attention"] * 3
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM has layers of type \['linear_attention'\]"):
        generate(model, 4)


def test_prompts_that_are_no_tensor() -> None:
    with pytest.raises(ValueError, match=r"input_ids must be a tensor \[B, P\].*found list"):
        drafter().spec_generate([[1, 2]], target(), 4)


def test_a_drafter_of_another_dtype() -> None:
    with pytest.raises(ValueError, match=r"drafter's dtype is torch.bfloat16 and the target's is torch.float32"):
        drafter().bfloat16().spec_generate(torch.tensor([[1, 2]]), target(), 4)


def test_a_calibration_of_another_drafter() -> None:
    other = Calibration.fresh(7, torch.device("cpu"))
    with pytest.raises(ValueError, match="calibration is of 7 depths, and this drafter has 4"):
        generate(target(), 4, calibration=other)


def test_layers_without_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target whose config does not tell that a layer has another kind of memory."""
    model = target()
    monkeypatch.setattr(model.model.layers[2].self_attn, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises(ValueError, match=r"layers \[2\] of Qwen3ForCausalLM keep no K/V"):
        generate(model, 4)


def test_a_streamer_and_a_batch() -> None:
    with pytest.raises(ValueError, match="a streamer takes one sequence, and input_ids has 3"):
        generate(target(), 4, streamer=Recorder())
