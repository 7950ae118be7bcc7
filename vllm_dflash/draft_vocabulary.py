# SPDX-License-Identifier: Apache-2.0
"""Which tokens a drafter may draft, when it is to read only part of the LM head. Torch-free.

A token left out can never be drafted, so a block ends before it; verification still yields it. Frequency is what
counts: a few tens of thousands of tokens make up nearly all of a text (FR-Spec, arXiv 2502.14856).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from vllm_dflash.whole_numbers import is_whole

#: Text -> token ids.
Encode = Callable[[str], Iterable[int]]
_OPTION = '--additional-config\'s "dflash": "draft_vocab_size"'


def choose_draft_vocabulary(
    size: int, vocab_size: int, file: str | None, required: Iterable[int], encode: Callable[[], Encode]
) -> list[int]:
    """The chosen token ids, ascending: the required ones, then the most frequent ones.

    Without a file, and where it names too few, ids count up from 0: in a BPE vocabulary the earliest merges, which are
    the commonest, have the lowest ids. `encode` makes a tokenizer, and is only called for a file of text.
    Raises ValueError naming the file and line, or the size.
    """
    ranked = _ranked(Path(file), vocab_size, encode) if file is not None else ()
    return filled_vocabulary(size, vocab_size, required, ranked, _OPTION)


def filled_vocabulary(
    size: int, vocab_size: int, required: Iterable[int], ranked: Iterable[int], setting: str
) -> list[int]:
    """`size` token ids, ascending: the required ones, then those of `ranked` from its beginning, then the lowest.

    `ranked` is not looked at before the size is found to fit. Raises ValueError naming the `setting` and its value.
    """
    if size > vocab_size:
        raise ValueError(f"{setting} = {size}, but the target has {vocab_size} tokens")
    chosen = dict.fromkeys(token for token in required if 0 <= token < vocab_size)
    if len(chosen) > size:
        raise ValueError(f"{setting} = {size} has no room for the target's {len(chosen)} stop tokens")
    for token in (*ranked, *range(vocab_size)):
        if len(chosen) >= size:
            break
        chosen[token] = None
    return sorted(chosen)


def _ranked(file: Path, vocab_size: int, encode: Callable[[], Encode]) -> Iterator[int]:
    """Token ids of a file, most frequent first. Ties in the order of first appearance."""
    try:
        if file.suffix == ".json":
            tokens = _frequency_list(file)
        else:
            tokens = [token for token, _ in _counts(file, encode).most_common()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text: {error}") from error
    for token in tokens:
        if not is_whole(token, 0, vocab_size - 1):
            raise ValueError(f"{file}: token id {token!r} is not in the target's vocabulary of {vocab_size}")
    yield from tokens


def _frequency_list(file: Path) -> list[int]:
    """A JSON list of token ids, most frequent first, or an object of counts by token id."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if isinstance(content, list):
        return content
    if isinstance(content, dict) and all(key.isdigit() and isinstance(count, int) for key, count in content.items()):
        return [int(key) for key in sorted(content, key=lambda key: -content[key])]
    raise ValueError(f"{file}: expected a list of token ids, most frequent first, or an object of counts by token id")


def _counts(file: Path, encode: Callable[[], Encode]) -> Counter[int]:
    """How often each token stands in a corpus: JSON lines with `token_ids` or `text`, or plain text."""
    counts: Counter[int] = Counter()
    to_ids: Encode | None = None
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            content = _line(file, number, line) if file.suffix == ".jsonl" else line
            if isinstance(content, str):
                to_ids = to_ids or encode()
                content = list(to_ids(content))
            counts.update(content)
    return counts


def _line(file: Path, number: int, line: str) -> str | list[int]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{number}: not JSON: {error}") from error
    content = record.get("token_ids", record.get("text")) if isinstance(record, dict) else None
    if isinstance(content, str) or (isinstance(content, list) and all(type(token) is int for token in content)):
        return content
    raise ValueError(f'{file}:{number}: expected an object with "token_ids" (integers) or "text" (a string)')
