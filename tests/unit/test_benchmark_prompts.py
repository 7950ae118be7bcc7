# SPDX-License-Identifier: Apache-2.0
"""Prompt sets: which lines are taken, and what a bad line says."""

import json
from pathlib import Path

import pytest

from vllm_dflash.benchmark.job import Prompt
from vllm_dflash.benchmark.prompts import load_prompts


def write_set(path: Path, count: int) -> Path:
    records = [
        {"id": f"p{i}", "kind": "code", "text": f"x = {i}", "prompt_token_ids": [i, i + 1]} for i in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_prompts_are_spread_over_the_file(tmp_path: Path) -> None:
    prompts = load_prompts(write_set(tmp_path / "set.jsonl", 10), 4)
    assert [prompt.name for prompt in prompts] == ["p0", "p2", "p5", "p7"]


def test_a_prompt_keeps_its_token_ids_unless_they_are_of_another_tokenizer(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set.jsonl", 1)
    assert load_prompts(path, 1) == (Prompt("p0", "x = 0", (0, 1)),)
    assert load_prompts(path, 1, with_token_ids=False) == (Prompt("p0", "x = 0", None),)


def test_a_short_file_gives_all_it_has(tmp_path: Path) -> None:
    assert len(load_prompts(write_set(tmp_path / "set.jsonl", 3), 8)) == 3


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    path, text = tmp_path / "set.jsonl", "one\u2028two\u0085three"
    first, second = (json.dumps({"id": name, "text": text}, ensure_ascii=False) for name in "ab")
    path.write_text(f"{first}\n\n{second}\n", encoding="utf-8")
    assert load_prompts(path, 9) == (Prompt("a", text), Prompt("b", text))


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(b'{"id": "a", "text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"set\.jsonl: cannot be read: .*utf-8"):
        load_prompts(path, 1)


@pytest.mark.parametrize("line", ["not json", '{"id": "p1"}', "[1]", "null"])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = write_set(tmp_path / "set.jsonl", 1)
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"set\.jsonl:2: not a prompt"):
        load_prompts(path, 2)
