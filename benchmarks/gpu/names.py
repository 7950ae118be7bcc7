# SPDX-License-Identifier: Apache-2.0
"""The three engines, by name."""

from __future__ import annotations

from typing import Any

NONE, OWN, OURS = ENGINES = ("none", "own", "ours")
LABELS = {NONE: "no speculation", OWN: "vLLM's own dflash", OURS: "vllm_dflash"}

Record = dict[str, Any]
