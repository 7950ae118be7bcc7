# SPDX-License-Identifier: Apache-2.0
"""Reads the files of a pair into `facts`. Raises UnreadableError where there is nothing to look at."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_dflash.doctor.drafter_config import ReadConfig
from vllm_dflash.doctor.facts import Drafter, Target, TokenizerFacts, Weights
from vllm_dflash.doctor.weights import read_weights

#: Where the config of a multimodal model keeps what is about its decoder.
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


class UnreadableError(Exception):
    """A model that cannot be looked at. The message names the flag, the file and what was seen."""


def read_target(flag: str, source: str, directory: Path, remote: Weights | None = None) -> Target:
    """remote: the weights where they are not in the directory."""
    raw = _read_config(flag, directory)
    return Target(
        source=source,
        raw=raw,
        text=_decoder_config(raw),
        weights=read_weights(directory) if remote is None else remote,
        tokenizer=read_tokenizer(directory),
        end_token_ids=_end_token_ids(directory, raw),
    )


def read_drafter(flag: str, source: str, directory: Path, target: Target, remote: Weights | None = None) -> Drafter:
    """remote: the weights where they are not in the directory."""
    raw = _read_config(flag, directory)
    read = ReadConfig(raw, source, target.text)
    return Drafter(
        source=source,
        raw=raw,
        flat=read.flat,
        config=read.config,
        config_errors=tuple(read.config_errors),
        other_errors=tuple(read.other_errors),
        weights=read_weights(directory) if remote is None else remote,
    )


def _read_config(flag: str, directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    if not file.is_file():
        raise UnreadableError(f"{flag}: there is no {file}")
    content = _json(file)
    if not isinstance(content, dict):
        raise UnreadableError(f"{flag}: {file} must hold a JSON object, found {content!r:.60}")
    return content


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UnreadableError(f"{file} is not valid JSON: {error}") from error


def _optional(file: Path) -> dict[str, Any]:
    """The object in a file that need not be there."""
    content = _json(file) if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def _decoder_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in _NESTED:
        if isinstance(raw.get(key), Mapping):
            return _decoder_config(raw[key])
    return raw


def _end_token_ids(directory: Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    generation = _optional(directory / "generation_config.json")
    ids: list[int] = []
    for source in (generation, raw):
        value = source.get("eos_token_id")
        ids += [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)]
    return tuple(dict.fromkeys(ids))


def read_tokenizer(directory: Path) -> TokenizerFacts | None:
    """From `tokenizer.json` and `tokenizer_config.json`; None where there is neither."""
    try:
        return _read_tokenizer(directory)
    except UnreadableError as error:
        return TokenizerFacts(problem=str(error))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return TokenizerFacts(problem=f"the tokenizer files in {directory} are not of the usual form: {error!r}")


def _read_tokenizer(directory: Path) -> TokenizerFacts | None:
    fast, settings = _optional(directory / "tokenizer.json"), _optional(directory / "tokenizer_config.json")
    if not fast and not settings:
        return None
    tokens: dict[int, str] = {}
    vocabulary = (fast.get("model") or {}).get("vocab")
    if isinstance(vocabulary, Mapping):
        tokens |= {id: text for text, id in vocabulary.items()}
    elif isinstance(vocabulary, list):  # unigram: [text, score] each
        tokens |= {id: str(entry[0]) for id, entry in enumerate(vocabulary)}
    special: set[int] = set()
    for id, token in _added_tokens(fast, settings):
        tokens[id] = str(token.get("content"))
        if token.get("special"):
            special.add(id)
    ids = {text: id for id, text in tokens.items()}
    roles = {role: ids[text] for role in _ROLES if (text := _text(settings.get(role))) in ids}
    templates = tuple(_chat_templates(directory, settings))
    return TokenizerFacts(tokens, frozenset(special), _text(settings.get("mask_token")), roles, templates)


def _added_tokens(fast: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for token in fast.get("added_tokens") or []:
        yield token["id"], token
    for id, token in (settings.get("added_tokens_decoder") or {}).items():
        yield int(id), token


def _text(token: Any) -> str | None:
    """A token's text: tokenizer_config.json holds it plain or as an object."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _chat_templates(directory: Path, settings: Mapping[str, Any]) -> Iterator[str]:
    """Of all homes that a chat template may have."""
    template = settings.get("chat_template")
    if isinstance(template, str):
        yield template
    elif isinstance(template, list):  # several, by name
        yield from (str(one.get("template")) for one in template if isinstance(one, Mapping))
    file = directory / "chat_template.jinja"
    if file.is_file():
        yield file.read_text(encoding="utf-8")
    other = _optional(directory / "chat_template.json").get("chat_template")
    if isinstance(other, str):
        yield other
