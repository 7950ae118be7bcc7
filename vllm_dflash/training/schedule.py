# SPDX-License-Identifier: Apache-2.0
"""The learning-rate schedule of both trainings: linear warm-up, then a cosine to zero."""

from __future__ import annotations

import math


def cosine_with_warmup(step: int, steps: int, warmup: float) -> float:
    """The factor for the peak rate at `step` of `steps` (counted from 1); `warmup` is a share of the steps."""
    warm = max(1, round(steps * warmup))
    if step <= warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
