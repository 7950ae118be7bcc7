# SPDX-License-Identifier: Apache-2.0
"""Files that are never half written, and JSON lines that are read as they are."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Replace the file in one move: a kill, and another process that reads, find the old one or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def numbered_lines(file: Path) -> list[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1. Raises ValueError naming a file that cannot be read.

    Only a newline ends a line: a JSON string may hold others that `str.splitlines` ends one at, such as U+2028.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
