# SPDX-License-Identifier: Apache-2.0
"""Whole numbers that a user, a config.json or a file gives. Torch-free."""

from __future__ import annotations

import math
from typing import TypeGuard


def is_whole(value: object, least: int = 1, most: float = math.inf) -> TypeGuard[int]:
    """Whether that is a whole number from `least` to `most`; JSON's true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
