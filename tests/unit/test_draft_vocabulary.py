# SPDX-License-Identifier: Apache-2.0
"""Which tokens may be drafted: every kind of file, ties, what is too few or too many, and errors that name the line.

The target has 10 tokens. Letters are tokens to the stub tokenizer: a is 0, b is 1, ...; all else is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vllm_dflash.draft_vocabulary import Encode, choose_draft_vocabulary

VOCAB_SIZE = 10


def letters() -> Encode:
    return lambda text: [ord(letter) - ord("a") for letter in text if letter.isalpha()]


def no_tokenizer() -> Encode:
    raise AssertionError("a tokenizer is made where none is needed")


def choose(
    size: int, file: Path | None = None, required: Sequence[int] = (), tokenizer: Any = no_tokenizer
) -> list[int]:
    return choose_draft_vocabulary(size, VOCAB_SIZE, None if file is None else str(file), required, tokenizer)


def written(directory: Path, name: str, *lines: str) -> Path:
    """A file of `lines`, each ended by a newline."""
    file = directory / name
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def complaint(file: Path, tokenizer: Any = letters) -> str:
    with pytest.raises(ValueError) as caught:
        choose(4, file, tokenizer=tokenizer)
    return str(caught.value)


# Without a file.


def test_without_a_file_ids_count_up() -> None:
    assert choose(4) == [0, 1, 2, 3]


def test_required_tokens_come_first() -> None:
    assert choose(4, required=[9, 7]) == [0, 1, 7, 9]


def test_a_required_token_is_not_counted_twice() -> None:
    assert choose(4, required=[1, 9, 1]) == [0, 1, 2, 9]


def test_required_tokens_outside_the_vocabulary_are_not_there_to_draft() -> None:
    assert choose(3, required=[10, -1, 8]) == [0, 1, 8]


def test_fewer_than_are_required() -> None:
    with pytest.raises(ValueError, match='"draft_vocab_size" = 2 has no room for the target\'s 3 stop tokens'):
        choose(2, required=[9, 3, 5])


def test_the_whole_vocabulary() -> None:
    assert choose(10, required=[9]) == list(range(10))


def test_more_than_the_vocabulary() -> None:
    with pytest.raises(ValueError) as caught:
        choose(11)
    assert '--additional-config\'s "dflash": "draft_vocab_size" = 11' in str(caught.value)
    assert "the target has 10 tokens" in str(caught.value)


# Frequencies.


def test_list_most_frequent_first(tmp_path: Path) -> None:
    file = written(tmp_path, "list.json", "[7, 2, 9, 4, 0]")
    assert choose(1, file) == [7]
    assert choose(3, file) == [2, 7, 9]
    assert choose(3, file, required=[5]) == [2, 5, 7]


def test_a_token_listed_twice_takes_one_place(tmp_path: Path) -> None:
    assert choose(3, written(tmp_path, "list.json", "[7, 7, 2, 7, 9]")) == [2, 7, 9]


def test_too_few_are_filled_up_from_0(tmp_path: Path) -> None:
    assert choose(5, written(tmp_path, "list.json", "[7, 1]"), required=[8]) == [0, 1, 2, 7, 8]


def test_empty_list(tmp_path: Path) -> None:
    assert choose(2, written(tmp_path, "list.json", "[]")) == [0, 1]


def test_counts_by_token_id(tmp_path: Path) -> None:
    file = written(tmp_path, "counts.json", '{"3": 5, "8": 70, "1": 6}')
    assert choose(1, file) == [8]
    assert choose(2, file) == [1, 8]


def test_equal_counts_keep_the_order_of_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "counts.json", '{"9": 2, "3": 2, "6": 2, "4": 2, "5": 3}')
    assert choose(3, file) == [3, 5, 9]


# Corpora.


def test_json_lines_of_token_ids(tmp_path: Path) -> None:
    """6 three times, 2 twice, 9 and 4 once."""
    file = written(
        tmp_path, "corpus.jsonl", '{"token_ids": [9, 6, 2]}', '{"token_ids": []}', '{"token_ids": [6, 2, 6, 4]}'
    )
    assert choose(1, file) == [6]
    assert choose(2, file) == [2, 6]
    assert choose(3, file) == [2, 6, 9]


def test_json_lines_of_text(tmp_path: Path) -> None:
    """h four times, c three times, j twice, a once."""
    file = written(tmp_path, "corpus.jsonl", '{"text": "a hhh"}', '{"text": "cc j"}', '{"text": "h c j"}')
    assert choose(1, file, tokenizer=letters) == [7]
    assert choose(3, file, tokenizer=letters) == [2, 7, 9]


def test_token_ids_are_preferred_to_their_text(tmp_path: Path) -> None:
    assert choose(1, written(tmp_path, "corpus.jsonl", '{"text": "bbb", "token_ids": [5]}')) == [5]


def test_plain_text(tmp_path: Path) -> None:
    """e three times, d twice, a and b once. Digits and braces are no tokens here, and no JSON."""
    file = written(tmp_path, "corpus.txt", "a {d} e", "", "ed 12 e b")
    assert choose(2, file, tokenizer=letters) == [3, 4]
    assert choose(3, file, tokenizer=letters) == [0, 3, 4]


def test_one_tokenizer_serves_all_lines(tmp_path: Path) -> None:
    made: list[Encode] = []

    def tokenizer() -> Encode:
        made.append(letters())
        return made[-1]

    choose(2, written(tmp_path, "corpus.txt", "a b", "c d", "e"), tokenizer=tokenizer)
    assert len(made) == 1


def test_ties_go_to_what_came_first(tmp_path: Path) -> None:
    file = written(tmp_path, "corpus.txt", "i g", "c g", "b i c")
    assert choose(1, file, tokenizer=letters) == [8]
    assert choose(2, file, tokenizer=letters) == [6, 8]
    assert choose(3, file, tokenizer=letters) == [2, 6, 8]


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.txt"])
def test_empty_corpus(tmp_path: Path, name: str) -> None:
    assert choose(3, written(tmp_path, name), required=[6]) == [0, 1, 6]


# What cannot be read.


@pytest.mark.parametrize("content", ["", "[1, 2", "hello"])
def test_list_that_is_not_json(tmp_path: Path, content: str) -> None:
    file = written(tmp_path, "list.json", content)
    assert complaint(file).startswith(f"{file}: not JSON: ")


@pytest.mark.parametrize("content", ['"abc"', "3", "null", '{"a": 1}', '{"1": "many"}', '{"1": 2.5}', '{"-1": 3}'])
def test_json_that_is_neither_list_nor_counts(tmp_path: Path, content: str) -> None:
    file = written(tmp_path, "list.json", content)
    message = complaint(file)
    assert message.startswith(f"{file}: expected a list of token ids")
    assert "counts by token id" in message


@pytest.mark.parametrize("line", ["{", '{"text": "b"', "not json", ""])
def test_line_that_is_not_json(tmp_path: Path, line: str) -> None:
    file = written(tmp_path, "corpus.jsonl", '{"text": "a"}', line, '{"text": "a"}')
    assert complaint(file).startswith(f"{file}:2: not JSON: ")


@pytest.mark.parametrize("line", ['{"prompt": "a"}', '{"text": 3}', '{"token_ids": 3}', "[1]", '"a"', "7"])
def test_line_without_tokens_or_text(tmp_path: Path, line: str) -> None:
    file = written(tmp_path, "corpus.jsonl", '{"text": "a"}', '{"text": "b"}', line)
    message = complaint(file)
    assert message.startswith(f"{file}:3: expected an object with ")
    assert '"token_ids"' in message and '"text"' in message


@pytest.mark.parametrize(
    ("name", "content", "token"),
    [
        ("list.json", "[1, 10]", "10"),
        ("list.json", "[1, -1]", "-1"),
        ("list.json", '[1, "2"]', "'2'"),
        ("list.json", "[1, 2.0]", "2.0"),
        ("list.json", "[1, true]", "True"),
        ("list.json", "[1, [2]]", "[2]"),
        ("counts.json", '{"1": 4, "10": 3}', "10"),
        ("corpus.jsonl", '{"token_ids": [1, 10]}', "10"),
        ("corpus.txt", "a k", "10"),
    ],
)
def test_token_outside_the_vocabulary(tmp_path: Path, name: str, content: str, token: str) -> None:
    file = written(tmp_path, name, content)
    assert complaint(file) == f"{file}: token id {token} is not in the target's vocabulary of 10"


@pytest.mark.parametrize("token", ["[2]", "{}", '"2"', "2.0", "null", "true"])
def test_line_of_tokens_that_are_no_ids(tmp_path: Path, token: str) -> None:
    file = written(tmp_path, "corpus.jsonl", '{"token_ids": [1]}', f'{{"token_ids": [1, {token}]}}')
    assert complaint(file).startswith(f'{file}:2: expected an object with "token_ids" (integers)')


@pytest.mark.parametrize("name", ["corpus.gz", "corpus.jsonl", "list.json"])
def test_file_that_is_not_text(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(b"\x1f\x8b\x08\x00\xff\xfe")
    assert complaint(file).startswith(f"{file}: not UTF-8 text: ")
