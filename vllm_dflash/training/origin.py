# SPDX-License-Identifier: Apache-2.0
"""Whose a folder's files are: what they were made of is written beside them, and compared before they are used."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_dflash.files import write_whole
from vllm_dflash.training.responses import Response


def check_origin(file: Path, origin: Mapping[str, Any], remedy: str) -> None:
    """Compare `origin` (JSON-ready) with what is in `file`, if there is such a file.

    Raises ValueError naming all keys that differ, and the remedy.
    """
    if not file.is_file():
        return
    there, wanted = _leaves(json.loads(file.read_text(encoding="utf-8"))), _leaves(json.loads(json.dumps(origin)))
    differing = [
        f"{key} was {there.get(key)!r} there and is {wanted.get(key)!r} now"
        for key in sorted(there.keys() | wanted.keys())
        if there.get(key) != wanted.get(key)
    ]
    if differing:
        raise ValueError(f"{file.parent} is of another run: {'; '.join(differing)}. {remedy}")


def write_origin(file: Path, origin: Mapping[str, Any]) -> None:
    """Say whose the folder's files are."""
    write_whole(file, json.dumps(origin, indent=1) + "\n")


def _leaves(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Of {"a": {"b": 1}}: {"a.b": 1}."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _leaves(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return found


def hash_of(sequences: Sequence[Sequence[int]]) -> str:
    """Of token ids, in their order."""
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(array("q", [len(ids), *ids]).tobytes())
    return digest.hexdigest()[:16]


def responses_hash(responses: Sequence[Response]) -> str:
    """Of the token ids alone: where the prompt ends and at what temperature it went on is not looked at."""
    return hash_of([response.sequence for response in responses])
