# SPDX-License-Identifier: Apache-2.0
"""From messages to what a model reads: through its chat template, or as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Messages = Sequence[dict[str, str]]


def raw_text(messages: Messages) -> str:
    """Without a template: all that was said, with an empty line between."""
    return "\n\n".join(message["content"] for message in messages)


def prompt_ids(tokenizer: Any, messages: Messages, chat: bool, thinking: bool | None) -> list[int]:
    """Token ids. chat, thinking: as in `LoadJob`. Raises ValueError for what the template refuses."""
    if not chat:
        return list(tokenizer.encode(raw_text(messages)))
    return list(_templated(tokenizer, messages, thinking, tokenize=True, return_dict=False))


def templated_text(tokenizer: Any, messages: Messages, thinking: bool | None) -> str:
    """For an API that takes text. Raises ValueError for what the template refuses."""
    return str(_templated(tokenizer, messages, thinking, tokenize=False))


def _templated(tokenizer: Any, messages: Messages, thinking: bool | None, **options: Any) -> Any:
    from jinja2 import TemplateError

    said = {} if thinking is None else {"enable_thinking": thinking}
    try:
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, **options, **said)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {type(error).__name__}: {error}") from error


def load_chat_tokenizer(flag: str, name: str, **options: Any) -> Any:
    """A tokenizer with a chat template. Raises ValueError naming the flag if there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        problem = f"{flag} {name}: its tokenizer cannot be read, and --chat needs its chat template: {error}"
        raise ValueError(problem[:400]) from error
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{flag} {name}: its tokenizer has no chat template; --raw sends prompts as they are")
    return tokenizer
