# SPDX-License-Identifier: Apache-2.0
"""Acceptance: the counting, and the messages for bad input."""

from types import SimpleNamespace

import pytest
import torch

from vllm_dflash.training import evaluate, pair
from vllm_dflash.training.prompts import Prompt


class ScriptedDraft:
    """Stands in for a drafter of block 4 whose rounds are known."""

    block_size = 4
    device = torch.device("meta")  # another one than torch's default

    def __init__(self, rounds):
        self.rounds = iter(rounds)

    def spec_generate(self, input_ids, **_):
        assert input_ids.device == self.device
        return SimpleNamespace(acceptance_lengths=next(self.rounds))


def test_acceptance_is_pooled_over_drafts_not_over_prompts():
    prompts = [Prompt("1", "raw", "", [5], "a.py"), Prompt("2", "raw", "", [5], "a.py")]
    result = evaluate.acceptance(ScriptedDraft([[4, 1, 2], [1]]), None, prompts, 8, None)
    # Accepted drafts 3, 0, 1, 0: length 1 + 4/4. First token kept in 2 of 4 drafts, second and third in 1.
    assert result.length == 2.0
    assert result.per_position == (0.5, 0.25, 0.25)


def test_nothing_drafted_is_an_error():
    with pytest.raises(ValueError, match="nothing was drafted"):
        evaluate.acceptance(ScriptedDraft([]), None, [], 8, None)


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (evaluate.main, ["--target", "/no/t", "--drafter", "/no/d", "--prompts", "/no/p"], "--target /no/t: no config"),
        (pair.main, ["--output", "/no/o", "--corpus", "/no/c"], "--corpus /no/c: no such folder"),
        (pair.main, ["--output", __file__], "is a file, a folder is needed"),
        (
            pair.main,
            ["--output", "/no/o", "--drafter-config", "/no/r.yaml"],
            "--drafter-config /no/r.yaml: cannot be read",
        ),
        (
            pair.main,
            ["--output", "/no/o", "--corpus", "/no/c", "--target-tokens", "-3"],
            "'-3' is not a positive integer",
        ),
    ],
)
def test_bad_flags_are_named(main, arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
