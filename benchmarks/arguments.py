# SPDX-License-Identifier: Apache-2.0
"""Arguments that several benchmarks take."""

from __future__ import annotations


def numbers(text: str) -> list[int]:
    """Of a list like 1,8,32."""
    return [int(part) for part in text.split(",")]
