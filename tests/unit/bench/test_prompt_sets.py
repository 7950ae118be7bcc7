# SPDX-License-Identifier: Apache-2.0
"""Prompt sets: the shipped one, the user's files, and the hub's with the hub replaced."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dflash.benchmark.sets import load_prompt_set
from vllm_dflash.benchmark.sets.conversations import Conversation, chosen
from vllm_dflash.benchmark.sets.hub import HUB_SETS, cache_directory
from vllm_dflash.benchmark.sets.jsonl import read_conversations


def write(path: Path, *records: Any) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_shipped_set_holds_code_maths_chat_and_several_turns() -> None:
    found = load_prompt_set("mini", None, 0, {}).conversations
    kinds = [conversation.name.split("-")[0] for conversation in found]
    assert {kind: kinds.count(kind) for kind in kinds} == {"code": 8, "maths": 6, "chat": 6, "turns": 4}
    assert {len(conversation.turns) for conversation in found} == {1, 2, 3}
    assert len({conversation.turns for conversation in found}) == 24


def test_a_seed_draws_the_same_prompts_and_another_one_others() -> None:
    everything = load_prompt_set("mini", None, 0, {}).conversations
    drawn = [tuple(c.name for c in load_prompt_set("mini", 5, seed, {}).conversations) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    order = [conversation.name for conversation in everything]
    assert [order.index(name) for name in drawn[0]] == sorted(order.index(name) for name in drawn[0])
    assert chosen(everything, 100, 0) == everything


def test_a_file_of_every_form(tmp_path: Path) -> None:
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}
    path = write(
        tmp_path / "own.jsonl",
        {"id": "a", "text": "plain", "kind": "ignored"},
        {"prompt": "p"},
        {"turns": ["one", "two"]},
        "",
        {"messages": [system, user]},
        {"messages": [user, {"role": "assistant", "content": "recorded"}]},
    )
    assert read_conversations(path) == (
        Conversation("a", ("plain",)),
        Conversation("own:2", ("p",)),
        Conversation("own:3", ("one", "two")),
        Conversation("own:5", ("u",), (system,)),
        Conversation("own:6", ("u",)),
    )
    assert load_prompt_set(str(path), None, 0, {}).name == "own"


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ("{", r"own\.jsonl:1: not JSON"),
        ([1], r"own\.jsonl:1: not a JSON object"),
        ({"question": "x"}, "none of the keys turns, messages, prompt, text; the keys found: question"),
        ({"text": ""}, "text = '': text is needed"),
        ({"turns": []}, r"turns = '\[\]': text is needed in a list"),
        ({"turns": ["a", 7]}, "text is needed in a list"),
        ({"messages": "x"}, "a list of messages is needed"),
        ({"messages": [{"role": "user"}]}, "role and content are needed"),
        ({"messages": [{"role": "system", "content": "s"}]}, "no message of the user at its end"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, record: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        read_conversations(write(tmp_path / "own.jsonl", record))


def test_what_is_no_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--dataset gsm9k: not a \.jsonl file, and the known sets are mini, gsm8k"):
        load_prompt_set("gsm9k", None, 0, {})
    with pytest.raises(ValueError, match="there is no such file"):
        load_prompt_set(str(tmp_path / "none.jsonl"), None, 0, {})
    with pytest.raises(ValueError, match="holds no prompt"):
        load_prompt_set(str(write(tmp_path / "empty.jsonl", "")), None, 0, {})


#: A row of each set as the hub has it, and what the user then says. Only fields that matter.
ROWS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "gsm8k": ({"question": "2+2?", "answer": "4"}, ["2+2?\n\nReason step by step"]),
    "math500": ({"problem": "x^2=4"}, ["x^2=4\n\nReason step by step"]),
    "aime24": ({"problem": "n"}, ["n\n\nReason step by step"]),
    "aime25": ({"problem": "m"}, ["m\n\nReason step by step"]),
    "humaneval": ({"prompt": "def f():\n"}, ["Complete this Python function"]),
    "mbpp": ({"prompt": "Write f.", "code": "x"}, ["Write f."]),
    "livecodebench": (
        {"question_content": "Sort.", "starter_code": "def s"},
        ["Solve this problem in Python.\n\nSort."],
    ),
    "swe-bench": ({"repo": "a/b", "problem_statement": "It fails."}, ["This issue was reported for a/b."]),
    "mt-bench": ({"prompt": ["First?", "Second?"]}, ["First?", "Second?"]),
    "alpaca": ({"instruction": "Add.", "input": "1, 2"}, ["Add.\n\n1, 2"]),
}


class Hub:
    """Stands in for the hub: gives one row, and notes what was asked of it."""

    def __init__(self, row: dict[str, Any], error: Exception | None = None) -> None:
        self.row, self.error, self.asked = row, error, []  # type: ignore[var-annotated]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def dataset_info(api: Any, repository: str, revision: str) -> Any:
            if self.error:
                raise self.error
            self.asked.append((repository, revision))
            return SimpleNamespace(sha="c0ffee")

        def load_dataset(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
            self.asked.append((arguments, options))
            return [self.row]

        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
        monkeypatch.setattr("datasets.load_dataset", load_dataset)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_DFLASH_CACHE", str(tmp_path))
    return tmp_path / "datasets"


def test_every_set_of_the_table_has_a_row() -> None:
    assert ROWS.keys() == HUB_SETS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes_what_the_user_says(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, turns = ROWS[name]
    Hub(row).install(monkeypatch)
    (conversation,) = load_prompt_set(name, None, 0, {}).conversations
    assert len(conversation.turns) == len(turns)
    for said, expected in zip(conversation.turns, turns, strict=True):
        assert said.startswith(expected)


def test_a_revision_is_resolved_to_a_commit_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub({"question": "2+2?"})
    hub.install(monkeypatch)
    found = load_prompt_set("gsm8k", None, 0, {"gsm8k": "v1"})
    assert (found.source, found.revision) == ("openai/gsm8k", "c0ffee")
    assert hub.asked == [
        ("openai/gsm8k", "v1"),
        (("openai/gsm8k", "main"), {"revision": "c0ffee", "split": "test"}),
    ]
    hub.error = ConnectionError("no hub")
    assert load_prompt_set("gsm8k", None, 0, {"gsm8k": "v1"}) == found  # from the cache
    assert [file.name for file in cache.iterdir()] == ["gsm8k@v1.jsonl"]


def test_files_of_a_repository_are_read_at_its_commit(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(ROWS["livecodebench"][0])
    hub.install(monkeypatch)
    load_prompt_set("livecodebench", None, 0, {})
    (arguments, options) = hub.asked[1]
    assert arguments == ("json",)
    assert options["data_files"][0] == "hf://datasets/livecodebench/code_generation_lite@c0ffee/test.jsonl"


def test_without_a_hub_one_error_names_the_set_and_what_works(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub({}, ConnectionError("no route")).install(monkeypatch)
    with pytest.raises(ValueError, match=r"--dataset gsm8k: openai/gsm8k .*no route.*--dataset mini.*FILE\.jsonl"):
        load_prompt_set("gsm8k", None, 0, {})
    assert not cache.exists()


def test_an_error_without_a_message_is_told_too(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub({}, ConnectionError()).install(monkeypatch)
    with pytest.raises(ValueError, match=r"--dataset gsm8k: .*\(ConnectionError: no message\)"):
        load_prompt_set("gsm8k", None, 0, {})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"repository": "r"}', '{"repository": "r", "commit": "c"}\n{'])
def test_a_damaged_cache_is_named(cache: Path, text: str) -> None:
    cache.mkdir()
    (cache / "gsm8k@v1.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"datasets/gsm8k@v1\.jsonl:"):
        load_prompt_set("gsm8k", None, 0, {"gsm8k": "v1"})


def test_a_row_of_another_form_names_the_key(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub({"frage": "2+2?"}).install(monkeypatch)
    with pytest.raises(ValueError, match="--dataset gsm8k: .*row 0 has no 'question'; its keys: frage"):
        load_prompt_set("gsm8k", None, 0, {})


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_DFLASH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_directory() == Path("/elsewhere/vllm_dflash/datasets")
