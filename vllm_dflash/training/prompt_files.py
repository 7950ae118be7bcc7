# SPDX-License-Identifier: Apache-2.0
"""Training prompts from the user's own files (JSON lines, plain text) or from a data set on the Hugging Face hub.

They are read one at a time, so a file may be larger than memory. Only prompts are kept: the answer that ends a
conversation is dropped, because the target writes its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

#: Where a record's prompt may be, in the order in which the keys are looked at, and what it may be there.
PROMPT_KEYS = {
    "messages": "a list of messages",
    "conversations": "a list of turns",
    "prompt": "text or a list of messages",
    "text": "text",
}
HUB_PREFIX = "hub:"
HUB_SOURCE = re.compile(r"hub:(?P<name>[^@:]+)(@(?P<revision>[^@:]+))?(:(?P<split>[^@:]+))?")

#: Kinds of trouble with a record; a request log counts its lines by them.
EMPTY, MALFORMED, NOT_TEXT, NOT_UNICODE, TOOLS = (
    "empty prompt",
    "malformed",
    "images or other parts that are not text",
    "not valid Unicode",
    "tools or tool calls",
)


@dataclass(frozen=True)
class UserPrompt:
    """One prompt: either `messages`, for the chat template, or `text`, which the model reads as it is."""

    id: str  # the record's own, or FILE_NAME:LINE, or NAME:INDEX in a data set of the hub
    messages: tuple[dict[str, str], ...] | None
    text: str | None


class BadPromptError(ValueError):
    """A record that gives no prompt. reason: the kind of trouble; the message tells the key and the value."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_prompts(source: str) -> Iterator[UserPrompt]:
    """Prompts of a `.jsonl`, `.json` (one record a line) or `.txt` file, or of `hub:NAME[@REVISION][:SPLIT]`.

    A record holds its prompt under `messages`, `conversations` (ShareGPT), `prompt` or `text`; keys other than these
    and `id` are not read. In a `.txt` file every paragraph is a prompt. Raises ValueError: for a source that is not
    there at once, for a bad record when it is reached, and for a source without any prompt at its end.
    """
    if source.startswith(HUB_PREFIX):
        return _at_least_one(_hub_prompts(source), source)
    path, readers = Path(source), {".jsonl": _json_prompts, ".json": _json_prompts, ".txt": _paragraphs}
    if path.suffix.lower() not in readers:
        known = "a .jsonl, .json or .txt file or hub:NAME[@REVISION][:SPLIT]"
        raise ValueError(f"{source}: the name ends in {path.suffix!r}; prompts are read from {known}")
    if not path.is_file():
        raise ValueError(f"{source}: there is no such file")
    return _at_least_one(readers[path.suffix.lower()](path), source)


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """A file's lines, counted from 1, not decoded.

    Only a line feed ends a line: inside JSON strings there may be other characters that Unicode takes for line ends.
    """
    try:
        with path.open("rb") as lines:
            yield from enumerate(lines, start=1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def prompt_of(record: object, default_id: str) -> UserPrompt:
    """The prompt of one record. Raises BadPromptError naming key and value."""
    if not isinstance(record, dict):
        raise BadPromptError(MALFORMED, f"not a JSON object but {_shown(record)}: one record a line is expected")
    # Data sets fill the columns that a row does not use with null.
    key = next((key for key in PROMPT_KEYS if record.get(key) is not None), None)
    if key is None:
        raise BadPromptError(
            MALFORMED, f"a prompt under none of {', '.join(PROMPT_KEYS)}; the keys found: {_shown(list(record))}"
        )
    value, own_id = record[key], record.get("id")
    prompt_id = own_id if isinstance(own_id, str) and own_id else default_id
    if isinstance(value, list) and key != "text":
        return UserPrompt(prompt_id, _messages(key, value, SHAREGPT if key == "conversations" else CHAT), None)
    if isinstance(value, str) and key in ("prompt", "text"):
        return UserPrompt(prompt_id, None, _raw_text(key, value))
    raise BadPromptError(MALFORMED, f"{key} is {_shown(value)}, not {PROMPT_KEYS[key]}")


def prompt_token_ids(prompt: UserPrompt, tokenizer: Any, chat_template_kwargs: Mapping[str, Any]) -> list[int]:
    """What the model reads: messages through the chat template, up to where the answer starts; text as it is.

    Raises ValueError if the tokenizer has no chat template for messages, or if its template refuses them.
    """
    if prompt.messages is None:
        return list(tokenizer.encode(prompt.text))
    if getattr(tokenizer, "chat_template", None) is None and "chat_template" not in chat_template_kwargs:
        raise ValueError(
            f"{prompt.id}: the tokenizer {_shown(getattr(tokenizer, 'name_or_path', ''))} has no chat template for "
            "messages: give raw prompts, as strings under `prompt`"
        )
    ours = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    if clash := sorted(ours.keys() & chat_template_kwargs.keys()):
        raise ValueError(f"chat template arguments: {clash[0]} = {chat_template_kwargs[clash[0]]!r} cannot be chosen")
    try:
        return list(tokenizer.apply_chat_template(list(prompt.messages), **ours, **chat_template_kwargs))
    except TemplateError as error:
        raise ValueError(f"{prompt.id}: the chat template refuses the messages: {error}") from error


def _at_least_one(prompts: Iterable[UserPrompt], source: str) -> Iterator[UserPrompt]:
    prompt = None
    for prompt in prompts:
        yield prompt
    if prompt is None:
        raise ValueError(f"{source}: there are no prompts in it")


# Files.


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in numbered_lines(path):
        try:
            yield number, line.decode("utf-8-sig")  # some editors start a file with a byte order mark
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8: {error}") from error


def _json_prompts(path: Path) -> Iterator[UserPrompt]:
    for number, line in _text_lines(path):
        if not line.strip():
            continue
        try:
            yield prompt_of(json.loads(line), f"{path.name}:{number}")
        except BadPromptError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not JSON: {error} in {_shown(line.strip())}") from error


def _paragraphs(path: Path) -> Iterator[UserPrompt]:
    start, paragraph = 0, ""
    for number, line in _text_lines(path):
        if line.strip():
            start = start if paragraph else number
            paragraph += line
        elif paragraph:
            yield _paragraph(path, start, paragraph)
            paragraph = ""
    if paragraph:
        yield _paragraph(path, start, paragraph)


def _paragraph(path: Path, start: int, lines: str) -> UserPrompt:
    return UserPrompt(f"{path.name}:{start}", None, lines.replace("\r\n", "\n").removesuffix("\n"))


# The hub.


def _hub_prompts(source: str) -> Iterator[UserPrompt]:
    match = HUB_SOURCE.fullmatch(source)
    if match is None:
        raise ValueError(f"{source}: not hub:NAME[@REVISION][:SPLIT]")
    return _row_prompts(_hub_rows(source, **match.groupdict()), source, match["name"])


def _hub_rows(source: str, name: str, revision: str | None, split: str | None) -> Iterable[object]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{source}: needs the package datasets: pip install 'vllm-dflash[train]'") from error
    try:
        rows: Iterable[object] = datasets.load_dataset(name, revision=revision, split=split or "train", streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: cannot be read: {error}") from error
    return rows


def _row_prompts(rows: Iterable[object], source: str, name: str) -> Iterator[UserPrompt]:
    for index, row in enumerate(rows):
        try:
            yield prompt_of(row, f"{name}:{index}")
        except BadPromptError as error:
            raise ValueError(f"{source}: row {index}: {error}") from error


# Records.


@dataclass(frozen=True)
class _Layout:
    """How a turn says who speaks, and what. roles: the speakers, as the chat template calls them."""

    role_key: str
    content_key: str
    roles: Mapping[str, str]


CHAT = _Layout("role", "content", {role: role for role in ("system", "developer", "user", "assistant")})
SHAREGPT = _Layout("from", "value", {"human": "user", "gpt": "assistant", "system": "system"})


def _messages(key: str, turns: list[object], layout: _Layout) -> tuple[dict[str, str], ...]:
    roles = [_role(f"{key}[{index}]", turn, layout) for index, turn in enumerate(turns)]
    while roles and roles[-1] == "assistant":
        roles.pop()
    messages = tuple(
        {"role": role, "content": _content(f"{key}[{index}]", turn, layout.content_key)}
        for index, (role, turn) in enumerate(zip(roles, turns, strict=False))  # the answer has lost its role
    )
    if not any(message["role"] == "user" and message["content"].strip() for message in messages):
        raise BadPromptError(EMPTY, f"{key} holds no user message with text: {_shown(turns)}")
    return messages


def _role(where: str, turn: object, layout: _Layout) -> str:
    if not isinstance(turn, dict):
        wanted = f"an object with {layout.role_key} and {layout.content_key}"
        raise BadPromptError(MALFORMED, f"{where} is {_shown(turn)}, not {wanted}")
    role = turn.get(layout.role_key)
    if role in ("tool", "function"):
        raise BadPromptError(TOOLS, f"{where}.{layout.role_key} is {role!r}: results of tools cannot be replayed")
    if not isinstance(role, str) or role not in layout.roles:
        known = ", ".join(layout.roles)
        raise BadPromptError(MALFORMED, f"{where}.{layout.role_key} is {_shown(role)}, not one of {known}")
    return layout.roles[role]


def _content(where: str, turn: Any, key: str) -> str:
    for calls in ("tool_calls", "function_call"):
        if turn.get(calls):
            raise BadPromptError(TOOLS, f"{where}.{calls} is {_shown(turn[calls])}: tool calls cannot be replayed")
    where, content = f"{where}.{key}", turn.get(key)
    if isinstance(content, list):
        # vLLM, too, puts parts on lines of their own for a chat template that takes text.
        return "\n".join(_part(f"{where}[{index}]", part) for index, part in enumerate(content))
    return _valid_text(where, content)


def _part(where: str, part: object) -> str:
    if not isinstance(part, dict):
        raise BadPromptError(MALFORMED, f"{where} is {_shown(part)}, not an object with type and text")
    if part.get("type") != "text":
        raise BadPromptError(
            NOT_TEXT, f"{where}.type is {_shown(part.get('type'))}: only parts of type 'text' are read"
        )
    return _valid_text(f"{where}.text", part.get("text"))


def _raw_text(key: str, value: str) -> str:
    if not value.strip():
        raise BadPromptError(EMPTY, f"{key} is blank: {_shown(value)}")
    return _valid_text(key, value)


def _valid_text(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise BadPromptError(MALFORMED, f"{where} is {_shown(value)}, not text")
    # JSON can escape half of a surrogate pair, which neither UTF-8 nor a tokenizer takes.
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise BadPromptError(
            NOT_UNICODE, f"{where} is not valid Unicode, it holds half a surrogate pair: {_shown(value)}"
        )
    return value


def _shown(value: object, longest: int = 80) -> str:
    """A value for a message, in one line of reasonable length."""
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."
