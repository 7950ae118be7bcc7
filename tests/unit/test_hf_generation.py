# SPDX-License-Identifier: Apache-2.0
"""spec_generate on tiny random fp32 pairs: its text is the target's own, whatever the drafter says."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch
from transformers import Qwen3ForCausalLM

from tests.helpers import drafter, target
from vllm_dflash.hf import SpecGenerateOutput, TargetFeatures
from vllm_dflash.hf import round as round_
from vllm_dflash.hf.choosing import Sampling

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = [5, 9, 2, 40, 7]
PROMPT_IDS = torch.tensor([PROMPT])
BLOCK = 5


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return target()


def greedy(model: Qwen3ForCausalLM, num_tokens: int) -> list[int]:
    """The target's own text past the prompt."""
    ids = model.generate(PROMPT_IDS, do_sample=False, max_new_tokens=num_tokens, pad_token_id=0)
    return ids[0, len(PROMPT) :].tolist()


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int], list[int]], dict[int, list[int]]]:
    """Make drafts right for a while: `counts` drafts of each round, in turn, are the target's tokens.

    Returns a record of what the drafter really drafted, by the number of tokens so far.
    """
    real = round_.draft

    def patch(text: list[int], counts: list[int]) -> dict[int, list[int]]:
        seen: dict[int, list[int]] = {}
        rounds = cycle(counts)

        def planted(draft, target, state, *rest):
            drafted = real(draft, target, state, *rest)  # keeps the draft cache as it would be
            tree = drafted.tree
            num_tokens = int(state.lengths[0]) + 1
            seen[num_tokens] = [int(state.anchors[0]), *tree.token_ids[0].tolist()]
            done, right = num_tokens - len(PROMPT), next(rounds)
            for row, wanted in enumerate(text[done : done + BLOCK - 1]):
                tree.token_ids[0, row] = wanted if row < right else (wanted + 1) % 96
            return drafted

        monkeypatch.setattr(round_, "draft", planted)
        return seen

    return patch


def generate(model: Qwen3ForCausalLM, max_new_tokens: int, **options) -> SpecGenerateOutput:
    return drafter(block_size=BLOCK).spec_generate(PROMPT_IDS, model, max_new_tokens, return_stats=True, **options)


def new_tokens(output: SpecGenerateOutput) -> list[int]:
    assert output.sequences[0, : len(PROMPT)].tolist() == PROMPT
    return output.sequences[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_greedy_text_is_the_targets(seed: int) -> None:
    model = target(seed)
    text = greedy(model, 24)
    assert len(set(text)) > 8, "the target says the same all the time: a test of nothing"
    output = drafter(seed, block_size=BLOCK).spec_generate(PROMPT_IDS, model, 24)
    assert isinstance(output, torch.Tensor)
    assert output.tolist() == [PROMPT + text]


@pytest.mark.parametrize("counts", [[4], [0], [3, 0, 1, 4, 2]], ids=["all right", "all wrong", "in between"])
def test_accepted_drafts_do_not_change_the_text(model: Qwen3ForCausalLM, plant: Callable, counts: list[int]) -> None:
    text = greedy(model, 41 + BLOCK)
    plant(text, counts)
    output = generate(model, 41)
    assert new_tokens(output) == text[:41]
    # The prompt's own forward gives token 1; each round then adds what it accepted and the target's next token.
    expected, done = [], 1
    for right in cycle(counts):
        if done >= 41:
            break
        expected.append(right + 1)
        done += right + 1
    assert output.acceptance_lengths == expected


def test_drafter_sees_the_same_whatever_was_accepted_before(model: Qwen3ForCausalLM, plant: Callable) -> None:
    """The draft cache holds the context and nothing of rejected drafts: the next block must not depend on them."""
    text = greedy(model, 30 + BLOCK)
    one_by_one = plant(text, [0])
    generate(model, 30)
    in_strides = plant(text, [3, 0, 2])
    generate(model, 30)
    common = one_by_one.keys() & in_strides.keys()
    assert len(common) > 5
    assert {at: one_by_one[at] for at in common} == {at: in_strides[at] for at in common}


def test_blocks_are_drafted_from_the_whole_context(model: Qwen3ForCausalLM, plant: Callable) -> None:
    """Each block equals one drafted from scratch: one target forward over the text, no cache, the anchor left out."""
    text, draft = greedy(model, 20 + BLOCK), drafter(block_size=BLOCK)
    drafted = plant(text, [2, 0, 3])
    generate(model, 20)
    assert len(drafted) > 5
    for num_tokens, block in drafted.items():
        tokens = torch.tensor([PROMPT + text[: num_tokens - len(PROMPT)]])
        row = torch.tensor([[int(tokens[0, -1]), *[95] * (BLOCK - 1)]])
        with torch.no_grad():
            states = model(tokens[:, :-1], output_hidden_states=True).hidden_states
            hidden = draft(
                position_ids=torch.arange(num_tokens - 1 + BLOCK)[None],
                noise_embedding=model.get_input_embeddings()(row),
                target_hidden=torch.cat([states[2], states[4]], dim=-1),  # layers 1 and 3
            )
            scratch = model.lm_head(hidden)[0, 1:].argmax(dim=-1).tolist()
        assert block == [tokens[0, -1], *scratch]


@pytest.mark.parametrize("right", [0, 4], ids=["one by one", "in the middle of a block"])
@pytest.mark.parametrize("max_new_tokens", [1, 2, 5, 6, 7, 13])
def test_stops_exactly_at_the_limit(model: Qwen3ForCausalLM, plant: Callable, max_new_tokens: int, right: int) -> None:
    text = greedy(model, 13 + BLOCK)
    plant(text, [right])
    assert new_tokens(generate(model, max_new_tokens)) == text[:max_new_tokens]


@pytest.mark.parametrize("right", [0, 4], ids=["one by one", "in the middle of a block"])
@pytest.mark.parametrize("stop_at", [0, 1, 3, 5, 8])
def test_stops_right_after_the_first_stop_token(
    model: Qwen3ForCausalLM, plant: Callable, stop_at: int, right: int
) -> None:
    text = greedy(model, 24)
    plant(text, [right])
    end = text.index(text[stop_at]) + 1  # the same token may have come earlier
    unused = next(token for token in range(96) if token not in text)
    assert new_tokens(generate(model, 20, stop_token_ids=[unused, text[stop_at]])) == text[:end]


def test_one_stop_token_need_not_be_a_list(model: Qwen3ForCausalLM) -> None:
    text = greedy(model, 12)
    for stop in (text[6], torch.tensor([text[6]])):
        assert new_tokens(generate(model, 12, stop_token_ids=stop)) == text[: text.index(text[6]) + 1]


def test_a_target_without_a_generation_config() -> None:
    model = target()
    text = greedy(model, 6)
    model.generation_config = None
    assert new_tokens(generate(model, 6)) == text


def test_a_stop_token_of_the_prompt_does_not_stop(model: Qwen3ForCausalLM) -> None:
    text = greedy(model, 6)
    stop = next(token for token in PROMPT if token not in text)
    assert new_tokens(generate(model, 6, stop_token_ids=[stop])) == text


def test_sampling_keeps_to_the_limit_and_follows_the_seed(model: Qwen3ForCausalLM) -> None:
    def sample(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return new_tokens(generate(model, 16, temperature=1.0))

    assert len(sample(0)) == 16
    assert sample(0) == sample(0)
    assert len({tuple(sample(seed)) for seed in range(4)}) == 4


@pytest.mark.parametrize(
    ("temperature", "expected"), [(1.0, [0.6, 0.3, 0.1]), (2.0, [0.4727, 0.3343, 0.1930])], ids=["T=1", "T=2"]
)
def test_choose_samples_the_tempered_distribution(temperature: float, expected: list[float]) -> None:
    """At T=2 the odds become their square roots: sqrt(6) : sqrt(3) : 1."""
    torch.manual_seed(0)
    num_samples = 20_000
    logits = torch.tensor([0.6, 0.3, 0.1]).log().expand(num_samples, -1)
    counts = Sampling(temperature).choose(logits).bincount(minlength=3)
    # Four standard deviations of a binomial count, at most 0.015.
    assert (counts / num_samples).tolist() == pytest.approx(expected, abs=4 * 0.5 / num_samples**0.5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, 1e-42])
def test_choose_without_temperature_takes_the_likeliest(temperature: float) -> None:
    assert Sampling(temperature).choose(torch.tensor([[0.1, 2.0, 1.0], [3.0, 0.0, 1.0]])).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("options", "possible"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.7}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_k": 3, "top_p": 1.0}, {0, 1, 2}),
        ({"top_k": 0}, {0, 1, 2, 3}),
    ],
    ids=["top_k", "top_p", "one is enough", "all but one", "all"],
)
def test_choose_keeps_to_the_likeliest(options: dict, possible: set[int]) -> None:
    logits = torch.tensor([0.55, 0.3, 0.1, 0.05]).log().expand(400, -1)
    chosen = Sampling(1.0, generator=torch.Generator().manual_seed(0), **options).choose(logits)
    assert set(chosen.tolist()) == possible


def test_a_generator_decides_the_samples() -> None:
    def sample(seed: int) -> list[int]:
        return Sampling(1.0, generator=torch.Generator().manual_seed(seed)).choose(torch.zeros(50, 96)).tolist()

    assert sample(1) == sample(1) != sample(2)


@pytest.mark.parametrize("options", [{"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": float("nan")}])
def test_samplings_that_leave_nothing(options: dict[str, float]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} must be .*found {value}"):
        Sampling(**({"temperature": 1.0} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_sample_method": "best"}, "must be one of greedy, probabilistic, found 'best'"),
        ({"draft_sample_method": "probabilistic"}, "needs a temperature above 0, found temperature = 0.0"),
        (
            {"draft_sample_method": "probabilistic", "temperature": 1.0, "tree_budget": 7},
            "is for plain chains, found tree_budget = 7 too",
        ),
    ],
    ids=["unknown", "greedy target", "tree"],
)
def test_draft_sample_methods_that_cannot_be(model: Qwen3ForCausalLM, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"draft_sample_method.*{message}"):
        generate(model, 4, **options)


@pytest.mark.parametrize(
    "input_ids",
    [torch.empty(1, 0, dtype=torch.long), torch.empty(0, 3, dtype=torch.long), torch.tensor([1, 2])],
    ids=["empty", "none", "no batch axis"],
)
def test_prompts_that_are_none(model: Qwen3ForCausalLM, input_ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="input_ids must be non-empty prompts") as caught:
        drafter().spec_generate(input_ids, model, 4)
    assert str(list(input_ids.shape)) in str(caught.value)


@pytest.mark.parametrize("max_new_tokens", [0, -3])
def test_limits_that_leave_no_token(model: Qwen3ForCausalLM, max_new_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"max_new_tokens must be at least 1, found {max_new_tokens}"):
        drafter().spec_generate(PROMPT_IDS, model, max_new_tokens)


def test_drafter_of_a_deeper_target(model: Qwen3ForCausalLM) -> None:
    draft = drafter(num_target_layers=12, dflash_config={"target_layer_ids": [1, 9]})
    with pytest.raises(ValueError, match=r"target_layer_ids \[1, 9\] reach beyond the 6 decoder layers"):
        draft.spec_generate(PROMPT_IDS, model, 4)


# Context features.


def test_features_are_the_outputs_of_the_tapped_layers(model: Qwen3ForCausalLM) -> None:
    """Layer i's output is hidden_states[i + 1]: entry 0 is the embedding."""
    with TargetFeatures(model, [0, 2, 4]) as features, torch.no_grad():
        states = model(PROMPT_IDS, output_hidden_states=True).hidden_states
        taken = features.take()
    assert len(states) == 7
    assert torch.equal(taken, torch.cat([states[1], states[3], states[5]], dim=-1))


def test_the_last_layers_feature_is_not_normed(model: Qwen3ForCausalLM) -> None:
    """hidden_states[-1] is, so it is not the output of the last layer."""
    with TargetFeatures(model, [5]) as features, torch.no_grad():
        last = model(PROMPT_IDS, output_hidden_states=True).hidden_states[-1]
        taken = features.take()
        assert torch.equal(model.model.norm(taken), last)
    assert not torch.allclose(taken, last)


def test_features_are_of_the_latest_forward_and_taken_once(model: Qwen3ForCausalLM) -> None:
    with TargetFeatures(model, [1]) as features, torch.no_grad():
        model(PROMPT_IDS)
        model(PROMPT_IDS[:, :2])
        assert features.take().shape == (1, 2, 48)
        with pytest.raises(RuntimeError, match="before a forward of the target"):
            features.take()


def test_hooks_are_gone_afterwards(model: Qwen3ForCausalLM) -> None:
    def num_hooks() -> int:
        return sum(len(layer._forward_hooks) for layer in model.model.layers)

    before = num_hooks()  # Transformers leaves some of its own behind
    with pytest.raises(KeyError), TargetFeatures(model, [1, 3]):
        assert num_hooks() == before + 2
        raise KeyError
    assert num_hooks() == before


def test_layers_that_give_no_hidden_states(model: Qwen3ForCausalLM) -> None:
    """Some models carry several streams through their layers: [4, B, T, H]."""
    last = len(model.model.layers) - 1
    handle = model.model.layers[last].register_forward_hook(lambda module, inputs, output: output[None])
    try:
        with TargetFeatures(model, [last]) as features, torch.no_grad():
            model(PROMPT_IDS)
            with pytest.raises(ValueError, match=r"shapes \[\[1, 1, 5, 48\]\], and a drafter reads hidden states"):
                features.take()
    finally:
        handle.remove()


def test_a_target_without_decoder_layers() -> None:
    with pytest.raises(ValueError, match="cannot find the decoder layers of Linear"):
        TargetFeatures(torch.nn.Linear(2, 2), [0])
