# SPDX-License-Identifier: Apache-2.0
"""Training prompts from logs of OpenAI-style requests, so that a drafter is trained on what its target is asked.

Logs hold more than prompts that can be replayed. What is left out is counted by reason, so that nobody trains on a
tenth of a log and believes it to be the whole.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_dflash.training.prompt_files import MALFORMED, TOOLS, BadPromptError, UserPrompt, numbered_lines, prompt_of

#: Where a logged line, and whatever it holds there, may keep the request's body.
BODY_KEYS = ("body", "request", "request_body")

#: Reasons for leaving out a line, besides those of prompt_files.
NOT_JSON, BODY_NOT_JSON, NO_REQUEST, TOKEN_IDS = "not JSON", "body not JSON", "not a request", "token ids"


@dataclass(frozen=True)
class CollectReport:
    """What became of the lines that were read. A completions request with several prompts counts once for each."""

    written: int
    duplicates: int
    skipped: dict[str, int]  # by reason
    first_malformed: str | None  # FILE:LINE of the first line that is not JSON


@dataclass
class _Skipped:
    reasons: Counter[str] = field(default_factory=Counter)
    first_malformed: str | None = None

    def __str__(self) -> str:
        counts = ", ".join(f"{count} x {reason}" for reason, count in self.reasons.items()) or "no lines"
        return counts + (f"; the first that is not JSON: {self.first_malformed}" if self.first_malformed else "")


def collect(
    logs: Sequence[Path], output: Path, *, max_prompts: int | None = None, overwrite: bool = False
) -> CollectReport:
    """Write the prompts of logged requests to `output`, a file for `read_prompts`: each once, in the logs' order.

    Reading stops once `max_prompts` are written; the report covers what was read. `output` appears under its name only
    when complete. Raises ValueError, and leaves `output` as it was, if there is nothing to write.
    """
    _check_arguments(logs, output, max_prompts, overwrite)
    partial = output.with_name(output.name + ".partial")
    skipped = _Skipped()
    try:
        written, duplicates = _write_distinct(_logged_prompts(logs, skipped), partial, max_prompts)
        if not written:
            raise ValueError(f"{', '.join(map(str, logs))}: no prompt to train on: {skipped}")
        partial.replace(output)
    except OSError as error:
        raise ValueError(f"{output}: cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    return CollectReport(written, duplicates, dict(skipped.reasons), skipped.first_malformed)


def _check_arguments(logs: Sequence[Path], output: Path, max_prompts: int | None, overwrite: bool) -> None:
    if not logs:
        raise ValueError("no request log is given")
    if output.suffix.lower() not in (".jsonl", ".json"):
        raise ValueError(f"{output}: the name ends in {output.suffix!r}; prompts are read again from .jsonl or .json")
    if not output.parent.is_dir():
        raise ValueError(f"{output}: there is no directory {output.parent}")
    if output.resolve() in [log.resolve() for log in logs]:
        raise ValueError(f"{output}: is one of the logs and would be overwritten")
    if output.exists() and not overwrite:
        raise ValueError(f"{output}: exists already; ask to overwrite it, or name another file")
    if max_prompts is not None and max_prompts < 1:
        raise ValueError(f"max_prompts is {max_prompts}; at least 1 prompt must be wanted")


def _write_distinct(prompts: Iterator[UserPrompt], file: Path, limit: int | None) -> tuple[int, int]:
    """How many prompts were written, and how many were not because they had been before."""
    seen: set[bytes] = set()
    duplicates = 0
    with file.open("w", encoding="utf-8") as out:
        for prompt in prompts:
            if (digest := _digest(prompt)) in seen:
                duplicates += 1
                continue
            seen.add(digest)
            out.write(json.dumps(_record(prompt), ensure_ascii=False) + "\n")
            if len(seen) == limit:
                break
    return len(seen), duplicates


def _digest(prompt: UserPrompt) -> bytes:
    """Stands for the prompt among those seen: all the prompts of a long log may not fit memory."""
    return hashlib.sha256(json.dumps([prompt.messages, prompt.text]).encode()).digest()


def _record(prompt: UserPrompt) -> dict[str, Any]:
    if prompt.messages is not None:
        return {"id": prompt.id, "messages": prompt.messages}
    return {"id": prompt.id, "prompt": prompt.text}


def _logged_prompts(logs: Sequence[Path], skipped: _Skipped) -> Iterator[UserPrompt]:
    for log in logs:
        for number, line in numbered_lines(log):
            if line.strip():
                yield from _line_prompts(line, f"{log}:{number}", skipped)


def _line_prompts(line: bytes, where: str, skipped: _Skipped) -> Iterator[UserPrompt]:
    try:
        logged = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        skipped.reasons[NOT_JSON] += 1
        skipped.first_malformed = skipped.first_malformed or where
        return
    try:
        records = _records(logged)
    except BadPromptError as error:
        skipped.reasons[error.reason] += 1
        return
    for index, record in enumerate(records):
        try:
            yield prompt_of(record, where if len(records) == 1 else f"{where}:{index}")
        except BadPromptError as error:
            skipped.reasons[error.reason] += 1


def _records(logged: object) -> list[dict[str, Any]]:
    """One record, as prompt_files reads them, for each prompt of the logged request."""
    body = _request_body(logged)
    if body is None:
        raise BadPromptError(NO_REQUEST, "neither messages nor a prompt in it")
    if body.get("tools") or body.get("functions"):
        # The chat template would have shown them to the model; without them the prompt is another one.
        raise BadPromptError(TOOLS, "the request offers tools")
    if body.get("messages") is not None:
        return [{"messages": body["messages"]}]
    return [{"prompt": text} for text in _texts(body["prompt"])]


def _request_body(logged: object, deeper: int = 2) -> dict[str, Any] | None:
    """The first object with messages or a prompt: what was logged, or what it holds up to `deeper` levels down."""
    if isinstance(logged, str):
        logged = _parsed(logged)
    if not isinstance(logged, dict):
        return None
    if any(logged.get(key) is not None for key in ("messages", "prompt")):
        return logged
    if deeper == 0:
        return None
    bodies = (_request_body(logged.get(key), deeper - 1) for key in BODY_KEYS)
    return next((body for body in bodies if body is not None), None)


def _parsed(text: str) -> object:
    """A body that was logged as text; None if it does not even look like an object, as a request line of HTTP."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadPromptError(BODY_NOT_JSON, f"the body is not JSON: {error}") from error


def _texts(prompt: object) -> list[str]:
    """The texts that a completions request asks to continue."""
    prompts = prompt if isinstance(prompt, list) else [prompt]
    texts = [text for text in prompts if isinstance(text, str)]
    if len(texts) == len(prompts):
        return texts or [""]  # no prompt at all is an empty one
    if isinstance(prompt, list) and all(isinstance(ids, (int, list)) for ids in prompt):
        raise BadPromptError(TOKEN_IDS, "the prompt is token ids")
    raise BadPromptError(MALFORMED, "the prompt is neither text nor token ids")
