# SPDX-License-Identifier: Apache-2.0
"""spec_generate with logits processors: its text is `target.generate`'s with the same ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from tests.helpers import drafter, planted_tree, target
from vllm_dflash.hf import SpecGenerateOutput

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = torch.tensor([[5, 9, 2, 40, 7], [0, 0, 81, 3, 17]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
VOCAB = 96


class AfterItself(LogitsProcessor):
    """Makes the token after the last one by far the likeliest, so that every token depends on the one before it."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        bonus = torch.zeros_like(scores)
        bonus.scatter_(1, (input_ids[:, -1:] + 1) % VOCAB, 100.0)
        return scores + bonus


LISTS = {
    "repetition": [RepetitionPenaltyLogitsProcessor(1.8)],
    "n-grams": [NoRepeatNGramLogitsProcessor(2)],
    "both": [RepetitionPenaltyLogitsProcessor(1.3), NoRepeatNGramLogitsProcessor(3)],
    "after itself": [AfterItself()],
}


@pytest.mark.parametrize("tree_budget", [None, 12], ids=["chain", "tree"])
@pytest.mark.parametrize("processors", LISTS.values(), ids=LISTS.keys())
def test_the_text_is_the_targets(processors: list[LogitsProcessor], tree_budget: int | None) -> None:
    model = target()
    options = {"attention_mask": MASK, "max_new_tokens": 30}
    greedy = model.generate(PROMPTS, do_sample=False, pad_token_id=0, logits_processor=processors, **options)
    plain = model.generate(PROMPTS, do_sample=False, pad_token_id=0, **options)
    assert not torch.equal(greedy, plain), "processors that change nothing"
    got = drafter(block_size=5).spec_generate(
        PROMPTS, model, logits_processor=LogitsProcessorList(processors), tree_budget=tree_budget, **options
    )
    assert torch.equal(got, greedy)


@pytest.mark.parametrize("tree_budget", [None, 8], ids=["chain", "tree"])
def test_drafts_are_accepted(tree_budget: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts that say what the processor says: all of them, and one token more each round."""
    from vllm_dflash.hf import round as round_

    real = round_.draft

    def planted(draft, target, state, *rest):
        drafted = real(draft, target, state, *rest)
        right = [[(int(anchor) + 1 + i) % VOCAB for i in range(4)] for anchor in state.anchors]
        return replace(drafted, tree=planted_tree(right, decoys=tree_budget is not None))

    monkeypatch.setattr(round_, "draft", planted)
    output = drafter(block_size=5).spec_generate(
        PROMPTS, target(), 22, attention_mask=MASK, logits_processor=LogitsProcessorList([AfterItself()]),
        tree_budget=tree_budget, return_stats=True,
    )  # fmt: skip
    assert isinstance(output, SpecGenerateOutput)
    assert output.sequences[:, 5:].tolist() == [[(last + 1 + i) % VOCAB for i in range(22)] for last in (7, 17)]
    assert output.acceptance_lengths_by_row == [[5, 5, 5, 5, 5]] * 2


def test_a_row_that_ended_is_left_alone() -> None:
    """A minimal length, and texts that end where it allows: at different places of the rows."""
    model = target()
    processors = [MinNewTokensLengthLogitsProcessor(5, 9, 11), RepetitionPenaltyLogitsProcessor(1.8)]
    options = {"attention_mask": MASK, "max_new_tokens": 30}
    greedy = model.generate(PROMPTS, do_sample=False, pad_token_id=0, logits_processor=processors, **options)
    stop = int(greedy[0, 5 + 12])
    expected = model.generate(
        PROMPTS, do_sample=False, pad_token_id=0, logits_processor=processors, eos_token_id=stop, **options
    )
    assert (expected == 0).any() or expected.shape[1] < 35
    got = drafter(block_size=5).spec_generate(
        PROMPTS, model, logits_processor=LogitsProcessorList(processors), stop_token_ids=[stop], **options
    )
    assert torch.equal(got, expected)


def test_not_inside_of_a_graph() -> None:
    with pytest.raises(ValueError, match=r"logits_processor = \['AfterItself'\] needs texts"):
        drafter().spec_generate(
            PROMPTS, target(), 4, compile=True, logits_processor=LogitsProcessorList([AfterItself()])
        )
