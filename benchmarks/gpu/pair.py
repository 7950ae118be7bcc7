# SPDX-License-Identifier: Apache-2.0
"""A target and its drafter, as their config.json describe them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from gpu.names import Record


def read_pair(folder: Path) -> tuple[Record, Record]:
    """The configs in target/ and drafter/, each with its own "path"."""
    target, drafter = (json.loads((folder / name / "config.json").read_text()) for name in ("target", "drafter"))
    return target | {"path": str(folder / "target")}, drafter | {"path": str(folder / "drafter")}


def kv_token_bytes(configs: Iterable[Record], dtype: str | None) -> int:
    """Keys and values of one token in all of these models."""
    heads = sum(c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"] for c in configs)
    return 2 * heads * (4 if dtype == "float32" else 2)
