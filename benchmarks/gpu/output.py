# SPDX-License-Identifier: Apache-2.0
"""Progress on the terminal, and files that are never half written."""

from __future__ import annotations

import time
from pathlib import Path


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def write_whole(file: Path, text: str) -> None:
    """Replace the file in one move: a kill leaves the old one or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
