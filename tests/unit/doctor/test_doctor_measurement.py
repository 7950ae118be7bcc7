# SPDX-License-Identifier: Apache-2.0
"""What runs of a pair say, and how prompts are run."""

import pytest

from tests.helpers import drafter_config
from vllm_dflash.benchmark.job import Prompt
from vllm_dflash.benchmark.metrics import AcceptanceCounts
from vllm_dflash.config import DFlashConfig
from vllm_dflash.doctor.measure import Way, run_of, token_ids, ways
from vllm_dflash.doctor.measurement import Measurement, Run, findings_of, is_clearly_faster


def run(shift: int, length: float, drafts: tuple[int, ...] = (10,) * 8, mode: str = "default") -> Run:
    total = sum(drafts)
    counts = AcceptanceCounts(total, 15 * total, round((length - 1) * total), ())
    return Run(tuple(i + shift for i in (1, 3)), shift, mode, counts, drafts)


def found(*runs: Run) -> list[tuple[str, str]]:
    measurement = Measurement(runs, 8, 64, "cpu", "float32", 1.0)
    return [(one.severity.name.lower(), one.id) for one in findings_of(measurement)]


def test_good_runs() -> None:
    assert found(run(0, 3.0), run(-1, 2.0), run(1, 3.05)) == [("ok", "acceptance"), ("ok", "target-layer-convention")]


def test_almost_nothing_accepted() -> None:
    assert found(run(0, 1.2))[0] == ("warning", "acceptance")
    assert found(run(0, 1.3))[0] == ("ok", "acceptance")


def test_nothing_drafted_is_no_low_acceptance() -> None:
    assert found(run(0, 1.0, (0, 0))) == [("info", "acceptance")]


def test_a_neighbour_that_is_better_on_every_prompt() -> None:
    given, better = run(0, 2.0, (10, 12, 14, 16, 18, 20, 22, 24)), run(-1, 3.0, (7, 8, 9, 11, 12, 13, 15, 16))
    assert found(given, better)[1] == ("warning", "target-layer-convention")


def test_a_neighbour_that_is_better_on_one_prompt_only() -> None:
    given, better = run(0, 2.0, (10, 10, 10, 10, 10, 10, 10, 40)), run(1, 2.8, (10, 10, 10, 10, 10, 10, 10, 8))
    assert found(given, better)[1] == ("info", "target-layer-convention")


def test_ids_beyond_the_target_with_a_neighbour_within() -> None:
    assert found(run(-1, 3.0)) == [("info", "target-layer-convention")]


@pytest.mark.parametrize(
    ("fewer", "more", "expected"),
    [
        # Differences 1, 2, 3, 4, 5, 6, 7, 8: mean 4.5, deviation 2.449, error 0.866: 5.2 errors.
        ((10,) * 8, (11, 12, 13, 14, 15, 16, 17, 18), True),
        # -4 and 6 in turn: mean 1, deviation 5.345, error 1.890: half an error.
        ((10,) * 8, (6, 16) * 4, False),
        ((10,) * 8, (11,) * 8, True),
        ((10,) * 8, (10,) * 8, False),
        # Too few to tell.
        ((10,) * 7, (20,) * 7, False),
    ],
)
def test_the_paired_comparison(fewer: tuple[int, ...], more: tuple[int, ...], expected: bool) -> None:
    assert is_clearly_faster(fewer, more) is expected


@pytest.mark.parametrize(("without", "severity"), [(3.0, "warning"), (2.1, "ok"), (1.4, "warning")])
def test_template_modes(without: float, severity: str) -> None:
    runs = run(0, 2.0, mode="thinking"), run(0, without, mode="no thinking")
    assert found(*runs)[1:] == [(severity, "thinking")]


def test_the_better_mode_is_advised() -> None:
    runs = run(0, 2.0, mode="thinking"), run(0, 3.0, mode="no thinking")
    (*_, told) = findings_of(Measurement(runs, 8, 64, "cpu", "float32", 1.0))
    assert '"enable_thinking": false' in told.change


def test_ways() -> None:
    assert [(way.shift, way.mode) for way in ways([1, 3], 6, False)] == [
        (0, "default"),
        (-1, "default"),
        (1, "default"),
    ]
    assert [way.shift for way in ways([0, 3], 6, False)] == [0, 1]
    assert [way.shift for way in ways([1, 5], 6, False)] == [0, -1]
    assert [way.shift for way in ways([1, 6], 6, False)] == [-1]
    assert [(way.shift, way.mode) for way in ways([1, 5], 6, True)] == [
        (0, "thinking"),
        (-1, "thinking"),
        (0, "no thinking"),
    ]


def test_drafts_are_counted() -> None:
    config = DFlashConfig.from_dict(drafter_config(block_size=4))
    counted = run_of(config, Way(0, "default"), [[4, 1], [2]])
    # Accepted 3, 0 and 1 of 3 each: the first token of two drafts, the second and third of one.
    assert counted.counts == AcceptanceCounts(3, 9, 4, (2, 1, 1), (3, 3, 3))
    assert counted.drafts_by_prompt == (2, 1)
    assert counted.length == pytest.approx(1 + 4 / 3)


class Tokenizer:
    """Gives the characters' numbers; its template says how it was asked."""

    chat_template: str | None = "template"

    def __call__(self, text: str, **_: object) -> object:
        return type("Encoding", (), {"input_ids": [ord(character) for character in text]})

    def apply_chat_template(self, messages: list, tokenize: bool, add_generation_prompt: bool, **options: bool) -> str:
        assert (tokenize, add_generation_prompt) == (False, True)
        return f"{messages[0]['role'][0]}{messages[0]['content']}{options.get('enable_thinking', '')}"


def test_prompts_go_through_the_template_in_the_mode_asked_for() -> None:
    plain, stored = Prompt("a", "x"), Prompt("b", "x", (4, 5))

    def text(prompt: Prompt, mode: str) -> str:
        return "".join(map(chr, token_ids(Tokenizer(), prompt, mode)))

    assert text(plain, "default") == "ux"
    assert text(plain, "thinking") == "uxTrue"
    assert text(stored, "no thinking") == "uxFalse"
    assert token_ids(Tokenizer(), stored, "default") == [4, 5]


def test_prompts_without_a_template_are_plain_text() -> None:
    bare = Tokenizer()
    bare.chat_template = None
    assert token_ids(bare, Prompt("a", "xy"), "default") == [120, 121]
