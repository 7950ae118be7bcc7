# SPDX-License-Identifier: Apache-2.0
"""Responses on disk while they are written: a kill at any time loses those under way, and the next run writes the rest.

One JSON object a line: the prompt's id and token ids, the response's token ids, its temperature. Beside it a small file
tells whose responses these are, so that those of another target or of other settings are never taken for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_dflash.training.origin import check_origin, write_origin
from vllm_dflash.training.responses import Response

RESPONSES_FILE, ORIGIN_FILE = "responses.jsonl", "responses.origin.json"


class ResponseStore:
    """The responses of one folder, by the ids of their prompts."""

    def __init__(self, folder: Path, origin: Mapping[str, Any]) -> None:
        """`origin`: JSON-ready; what the responses depend on. Raises ValueError if the folder holds others."""
        self.file, origin_file = folder / RESPONSES_FILE, folder / ORIGIN_FILE
        check_origin(origin_file, origin, "Choose another --output, or delete the responses there")
        if not origin_file.is_file():
            write_origin(origin_file, origin)
        self.responses = self._read()

    def missing(self, prompt_ids: Iterable[str]) -> list[str]:
        """Those that have no response yet, in their order."""
        return [prompt_id for prompt_id in prompt_ids if prompt_id not in self.responses]

    def add(self, written: Mapping[str, Response]) -> None:
        """Write these behind the others. They are whole on disk when this returns."""
        lines = [json.dumps({"id": key} | asdict(value), separators=(",", ":")) for key, value in written.items()]
        with self.file.open("a", encoding="utf-8") as out:
            out.write("".join(line + "\n" for line in lines))
        self.responses.update(written)

    def _read(self) -> dict[str, Response]:
        """What is there. A last line without an end was under way when a run was killed, and is cut off."""
        if not self.file.is_file():
            return {}
        raw = self.file.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            with self.file.open("r+b") as file:
                file.truncate(whole)
        found = {}
        for number, line in enumerate(raw[:whole].decode("utf-8").splitlines(), start=1):
            try:
                record = json.loads(line)
                prompt_id = record.pop("id")
                found[prompt_id] = Response(**record)
            except (TypeError, KeyError, json.JSONDecodeError) as error:
                raise ValueError(f"{self.file}:{number}: not a response record: {error}") from error
        return found
