# SPDX-License-Identifier: Apache-2.0
"""Progress on the terminal."""

from __future__ import annotations

import time


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
