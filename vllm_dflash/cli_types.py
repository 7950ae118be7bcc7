# SPDX-License-Identifier: Apache-2.0
"""Types of the options that commands in several files have."""

from __future__ import annotations

from enum import Enum


class Dtype(str, Enum):
    """What vLLM computes in. `auto` follows the checkpoint."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
