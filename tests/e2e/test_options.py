# SPDX-License-Identifier: Apache-2.0
"""The options that make a block cheaper change which drafts there are, never the output; bad ones end the start."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from tests.e2e.engines import DRAFTER, PAIR, TARGET, Run, dflash, held_out_prompts, run_engine
from vllm_dflash.hf import DFlashDraftModel
from vllm_dflash.training.reduced_vocabulary import take_rows
from vllm_dflash.training.saving import save_drafter

pytestmark = pytest.mark.engine

NUM_PROMPTS, MAX_TOKENS = 6, 48
BASE = {"model": str(TARGET), "dtype": "float32", "max_model_len": 1024}
#: Of 2048 tokens.
DRAFT_VOCAB_SIZE = 512
EOS = 2
#: Of these prompts without any options.
ACCEPTANCE_LENGTH = 4.15


def generate(
    folder: Path,
    options: dict[str, Any] | None,
    llm: dict[str, Any] | None = None,
    drafter: Path = DRAFTER,
    arrivals: list[int] | None = None,
    **environment: str,
) -> Run:
    """One engine, all prompts at once; without options, vLLM without speculation."""
    run = {"name": "run", "prompts": held_out_prompts(NUM_PROMPTS), "max_tokens": MAX_TOKENS}
    run |= {} if arrivals is None else {"arrivals": arrivals}
    drafting = {} if options is None else dflash(drafter) | {"additional_config": {"dflash": options}}
    return run_engine(folder, BASE | drafting | (llm or {}), [run], **environment)["run"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """vLLM without speculation."""
    return generate(tmp_path_factory.mktemp("reference"), None)


def accepted_drafts(run: Run) -> list[int]:
    """The drafted tokens among the output: of what a request gains in a step, all but the last, the target's own."""
    accepted = []
    for token_ids, lengths in zip(run.token_ids, run.step_lengths, strict=True):
        end = 0
        for length in lengths:
            accepted += token_ids[end : end + length - 1]
            end += length
    assert len(accepted) > NUM_PROMPTS * MAX_TOKENS / 4
    return accepted


def assert_only_drafts_of(vocabulary: set[int], run: Run, reference: Run) -> None:
    """Only these tokens were drafted. The output has others, and that was not for want of opportunity."""
    assert len(vocabulary) == DRAFT_VOCAB_SIZE
    assert set(accepted_drafts(run)) <= vocabulary
    others = [token for token_ids in reference.token_ids for token in token_ids if token not in vocabulary]
    assert len(others) > NUM_PROMPTS


def test_fp8_weights(reference: Run, tmp_path: Path) -> None:
    run = generate(tmp_path, {"draft_weights": "fp8"})
    assert run.token_ids == reference.token_ids
    assert run.acceptance_length > 0.9 * ACCEPTANCE_LENGTH


def test_prompts_that_wait(reference: Run, tmp_path: Path) -> None:
    """One comes before each step. After the first all have to wait for the fifth step, or the ninth."""
    run = generate(tmp_path, {"prefill_schedule_interval": 4}, arrivals=[0, 1, 2, 3, 4, 5])
    assert run.first_steps == [1, 5, 5, 5, 5, 9]
    assert run.token_ids == reference.token_ids
    assert run.acceptance_length == pytest.approx(ACCEPTANCE_LENGTH, rel=0.1)
    assert run.counters["vllm_dflash:prefill_schedule_interval"] == 4 - 1  # before the run it says 1


def test_reduced_vocabulary_on_two_ranks(reference: Run, tmp_path: Path) -> None:
    """The lowest ids. All of them are rows of the first rank's part of the LM head, and half go to the second."""
    options = {"draft_vocab_size": DRAFT_VOCAB_SIZE}
    run = generate(tmp_path, options, {"tensor_parallel_size": 2}, VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert run.token_ids == reference.token_ids
    assert run.acceptance_length > 0.8 * ACCEPTANCE_LENGTH
    assert_only_drafts_of(set(range(DRAFT_VOCAB_SIZE)), run, reference)


def test_fp8_weights_and_tokens_counted_in_a_text(reference: Run, tmp_path: Path) -> None:
    """The text is short, so that the lowest ids do better: what counts is that these are the tokens drafted."""
    corpus = text_file(tmp_path)
    options = {"draft_weights": "fp8", "draft_vocab_size": DRAFT_VOCAB_SIZE, "draft_vocab_file": str(corpus)}
    run = generate(tmp_path, options)
    assert run.token_ids == reference.token_ids
    assert run.acceptance_length > 0.55 * ACCEPTANCE_LENGTH
    assert_only_drafts_of(most_frequent(corpus), run, reference)


def test_a_vocabulary_of_the_drafter_s_own(reference: Run, tmp_path: Path) -> None:
    """As a training with `model.draft_vocab_size` writes it, of the shipped drafter's weights."""
    shipped = DFlashDraftModel.from_pretrained(str(DRAFTER))
    config = copy.deepcopy(shipped.config)
    config.draft_vocab_size, config.own_tensors = DRAFT_VOCAB_SIZE, ["d2t", "lm_head.weight"]
    draft = DFlashDraftModel(config)
    draft.load_state_dict(shipped.state_dict(), strict=False)
    corpus = text_file(tmp_path)
    take_rows(draft, AutoModelForCausalLM.from_pretrained(TARGET), sorted(most_frequent(corpus)))
    save_drafter(draft, tmp_path / "drafter")
    run = generate(tmp_path, {}, drafter=tmp_path / "drafter")
    assert run.token_ids == reference.token_ids
    assert run.acceptance_length > 0.55 * ACCEPTANCE_LENGTH
    assert_only_drafts_of(most_frequent(corpus), run, reference)


def text_file(folder: Path) -> Path:
    """The held-out texts."""
    lines = (PAIR / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    file = folder / "corpus.txt"
    file.write_text("".join(json.loads(line)["text"] + "\n" for line in lines), encoding="utf-8")
    return file


def most_frequent(corpus: Path) -> set[int]:
    """The end-of-sequence token, the commonest tokens of a text, and then the lowest ids."""
    tokenizer = Tokenizer.from_file(str(TARGET / "tokenizer.json"))
    with corpus.open(encoding="utf-8") as lines:
        counts = Counter(token for line in lines for token in tokenizer.encode(line, add_special_tokens=False).ids)
    ranked = [EOS, *(token for token, _ in counts.most_common()), *range(2048)]
    return set(list(dict.fromkeys(ranked))[:DRAFT_VOCAB_SIZE])


# Options that cannot be.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"draft_weight": "fp8"}, ["--additional-config", "unknown key(s) ['draft_weight']", "draft_weights"]),
        (
            {"draft_vocab_size": 512, "draft_vocab_file": "/nowhere/list.json"},
            ["--additional-config", "\"draft_vocab_file\" = '/nowhere/list.json' is not a file"],
        ),
        ({"draft_vocab_size": 2049}, ["--additional-config", '"draft_vocab_size" = 2049', "2048 tokens"]),
    ],
    ids=["unknown key", "missing file", "size too large"],
)
def test_bad_option_ends_the_start(options: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        generate(tmp_path, options)
    last_line = str(caught.value).rstrip().splitlines()[-1]
    for words in expected:
        assert words in last_line, str(caught.value)
