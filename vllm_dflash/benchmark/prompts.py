# SPDX-License-Identifier: Apache-2.0
"""Prompt sets on disk: JSON lines with `id`, `text` and optionally `prompt_token_ids`."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_dflash.benchmark.job import Prompt
from vllm_dflash.files import numbered_lines


def load_prompts(path: Path, count: int, with_token_ids: bool = True) -> tuple[Prompt, ...]:
    """`count` prompts spread evenly over the file, always the same ones.

    with_token_ids: keep the stored ids; they are right only for the tokenizer that the set was made with.
    Raises ValueError naming the file that cannot be read, or the line that is not a prompt.
    """
    lines = numbered_lines(path)
    count = min(count, len(lines))
    spread = [lines[i * len(lines) // count] for i in range(count)]
    return tuple(_parse(line, f"{path}:{number}", with_token_ids) for number, line in spread)


def _parse(line: str, where: str, with_token_ids: bool) -> Prompt:
    try:
        record = json.loads(line)
        name, text, token_ids = str(record["id"]), str(record["text"]), record.get("prompt_token_ids")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{where}: not a prompt with an id and a text: {error!r}") from error
    return Prompt(name, text, tuple(token_ids) if with_token_ids and token_ids else None)
