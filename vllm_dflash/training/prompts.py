# SPDX-License-Identifier: Apache-2.0
"""Prompts cut from source files: chat (a user shows the head of a snippet) and raw (a file's own text goes on)."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer

from vllm_dflash.files import numbered_lines, write_whole
from vllm_dflash.training.corpus import Document, snippets
from vllm_dflash.training.tokenizer import chat_text

CHAT, RAW = "chat", "raw"
RAW_STARTS = ("def ", "class ", "import ", "from ", "async def ", "@", '"""')


@dataclass(frozen=True)
class Prompt:
    """One prompt. text: what a client sends, the user message for chat; prompt_token_ids: what the model reads."""

    id: str
    kind: str  # "chat" or "raw"
    text: str
    prompt_token_ids: list[int]
    source: str  # path of the file it was cut from, relative to the corpus root


def chat_prompts(documents: Iterable[Document], tokenizer: Tokenizer, rng: random.Random) -> Iterator[Prompt]:
    """One prompt for every function and class of the documents."""
    for document in documents:
        for number, snippet in enumerate(snippets(document, rng)):
            ids = tokenizer.encode(chat_text(snippet.head)).ids
            yield Prompt(f"{CHAT}:{document.path}:{number}", CHAT, snippet.head, ids, document.path)


def raw_prompts(
    documents: Iterable[Document], tokenizer: Tokenizer, longest: int, rng: random.Random
) -> Iterator[Prompt]:
    """From each top-level statement a prompt of at most `longest` tokens (less at random), ending at a line's end."""
    for document in documents:
        lines = document.text.splitlines(keepends=True)
        for start in (i for i, line in enumerate(lines) if line.startswith(RAW_STARTS)):
            text, ids = _head("".join(lines[start : start + 80]), tokenizer, rng.randint(longest // 4, longest))
            if text:
                yield Prompt(f"{RAW}:{document.path}:{start + 1}", RAW, text, ids, document.path)


def of_length(prompts: Iterable[Prompt], shortest: int, longest: int) -> list[Prompt]:
    """Those of `shortest` to `longest` tokens."""
    return [prompt for prompt in prompts if shortest <= len(prompt.prompt_token_ids) <= longest]


def training_prompts(documents: list[Document], tokenizer: Tokenizer, longest: int, rng: random.Random) -> list[Prompt]:
    """As many raw prompts (40 to `longest` tokens) as chat prompts (40 to half of it), in random order."""
    chat = of_length(chat_prompts(documents, tokenizer, rng), 40, longest // 2)
    raw = of_length(raw_prompts(documents, tokenizer, longest, rng), 40, longest)
    fewer = min(len(chat), len(raw))
    return rng.sample(chat, fewer) + rng.sample(raw, fewer)


def held_out_prompts(
    documents: list[Document], tokenizer: Tokenizer, count: int, seed: int, longest: int = 200
) -> list[Prompt]:
    """`count` evaluation prompts of 40 to `longest` tokens, half chat, half raw, spread over the held-out files.

    Raises ValueError when a document is not held out, or when there are not enough prompts.
    """
    if leaked := [document.path for document in documents if not document.held_out]:
        raise ValueError(f"{leaked[0]} is a training file: evaluation prompts come from held-out files only")
    rng = random.Random(seed)
    chosen: list[Prompt] = []
    for prompts in (chat_prompts(documents, tokenizer, rng), raw_prompts(documents, tokenizer, longest, rng)):
        chosen += _spread(of_length(prompts, 40, longest), count // 2, rng)
    return chosen


def write_prompts(prompts: Iterable[Prompt], file: Path) -> None:
    """One JSON object a line."""
    with file.open("w", encoding="utf-8") as out:
        for prompt in prompts:
            out.write(json.dumps(asdict(prompt), ensure_ascii=False) + "\n")


def write_user_prompts(prompts: Iterable[Prompt], file: Path) -> None:
    """The same as a user has them, for `vllm-dflash train`: what is said in a chat, or plain text."""
    lines = []
    for prompt in prompts:
        said = {"messages": [{"role": "user", "content": prompt.text}]}
        record = said if prompt.kind == CHAT else {"prompt": prompt.text}
        lines.append(json.dumps({"id": prompt.id} | record, ensure_ascii=False) + "\n")
    write_whole(file, "".join(lines))


def read_prompts(file: Path) -> list[Prompt]:
    """Read what `write_prompts` wrote. Raises ValueError naming a file that cannot be read, or a bad record's line."""
    prompts = []
    for number, line in numbered_lines(file):
        try:
            prompts.append(Prompt(**json.loads(line)))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file}:{number}: not a prompt record: {error}") from error
    return prompts


def _head(text: str, tokenizer: Tokenizer, longest: int) -> tuple[str, list[int]]:
    """As many whole lines of `text` as fit `longest` tokens."""
    offsets = tokenizer.encode(text).offsets
    if len(offsets) > longest:
        text = text[: text.rfind("\n", 0, offsets[longest - 1][1]) + 1]
    return text, tokenizer.encode(text).ids


def _spread(prompts: list[Prompt], count: int, rng: random.Random) -> list[Prompt]:
    """Take turns between the files, so that one large file does not fill the set."""
    by_file: dict[str, list[Prompt]] = {}
    for prompt in rng.sample(prompts, len(prompts)):
        by_file.setdefault(prompt.source, []).append(prompt)
    ranked = [(turn, prompt) for queue in by_file.values() for turn, prompt in enumerate(queue)]
    ranked.sort(key=lambda item: item[0])
    if len(ranked) < count:
        raise ValueError(f"held-out files give {len(ranked)} prompts of the wanted length, {count} are needed")
    return [prompt for _, prompt in ranked[:count]]
