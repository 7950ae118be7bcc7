# SPDX-License-Identifier: Apache-2.0
"""Prompts of a JSONL file: `turns`, `messages`, `prompt` or `text` on every line, and an `id` if there is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_dflash.benchmark.sets.conversations import Conversation
from vllm_dflash.files import numbered_lines

KEYS = ("turns", "messages", "prompt", "text")


def read_conversations(path: Path) -> tuple[Conversation, ...]:
    """All of a file. Raises ValueError naming the file, or the line and the key that is not as it should be."""
    found = tuple(
        conversation_of(line, f"{path}:{number}", f"{path.stem}:{number}") for number, line in numbered_lines(path)
    )
    if not found:
        raise ValueError(f"{path}: holds no prompt")
    return found


def conversation_of(line: str, where: str, default_name: str) -> Conversation:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not a JSON object but {line[:60]!r}")
    key = next((key for key in KEYS if record.get(key) is not None), None)
    if key is None:
        raise ValueError(f"{where}: none of the keys {', '.join(KEYS)}; the keys found: {', '.join(record)}")
    name, value = str(record.get("id") or default_name), record[key]
    if key == "messages" or (key == "prompt" and isinstance(value, list)):
        history = _messages(value, f"{where}: {key}")
        return Conversation(name, (history[-1]["content"],), history[:-1])
    turns = value if key == "turns" else [value]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise ValueError(f"{where}: {key} = {str(value)[:60]!r}: text is needed{' in a list' * (key == 'turns')}")
    return Conversation(name, tuple(turns))


def _messages(value: Any, where: str) -> tuple[dict[str, str], ...]:
    """The user speaks last: what comes after is the model's to say."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} = {str(value)[:60]!r}: a list of messages is needed")
    for message in value:
        fields = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not all(isinstance(field, str) and field for field in fields):
            raise ValueError(f"{where}: {str(message)[:60]!r}: role and content are needed, both text")
    messages = tuple({"role": message["role"], "content": message["content"]} for message in value)
    if messages[-1]["role"] == "assistant":  # a recorded answer, which the model gives anew
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f"{where}: no message of the user at its end")
    return messages
