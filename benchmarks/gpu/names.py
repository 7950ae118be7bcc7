# SPDX-License-Identifier: Apache-2.0
"""The engines by name: what they are, and behind a colon their number of draft tokens or of a tree's nodes."""

from __future__ import annotations

import argparse
from typing import Any

NONE, OWN, OURS = ENGINES = ("none", "own", "ours")
#: Draft trees of this plugin, of so many nodes or "auto"; its chains, with prompts admitted as "auto" admits them; and
#: vLLM's own dflash with its adaptive verification.
TREE, PACED, ADAPTIVE = "tree", "paced", "adaptive"
LABELS = {
    NONE: "no speculation",
    OWN: "vLLM's own dflash",
    ADAPTIVE: "vLLM's own dflash, adaptive",
    OURS: "vllm_dflash",
    PACED: "vllm_dflash, prompts together",
    TREE: "vllm_dflash, tree",
}

Record = dict[str, Any]


def base(name: str) -> str:
    """What an engine is, without its size."""
    return name.split(":")[0]


def size(name: str) -> str | None:
    """What stands behind the colon."""
    return name.split(":")[1] if ":" in name else None


def label(name: str) -> str:
    """For a person."""
    return LABELS[base(name)] + (f" {size(name)}" if size(name) else "")


def is_ours(name: str) -> bool:
    """Whether the plugin is on."""
    return base(name) in (OURS, PACED, TREE)


def measures_itself(name: str) -> bool:
    """Whether the engine times its own steps when it starts."""
    return base(name) == ADAPTIVE or size(name) == "auto"


def check(name: str) -> None:
    """Raise ValueError for a name that says nothing."""
    number = size(name)
    if base(name) not in LABELS:
        raise ValueError(f"unknown {name!r}, known are {', '.join(LABELS)}")
    if base(name) == TREE and number != "auto" and not (number or "").isdigit():
        raise ValueError(f'{name!r}: a tree has a number of nodes, or "auto": tree:31')
    if base(name) != TREE and number is not None and not (base(name) in (OWN, OURS, PACED) and number.isdigit()):
        raise ValueError(f"{name!r}: behind the colon stands a number of draft tokens: own:7")


def parse_engines(text: str) -> tuple[str, ...]:
    """Names of a command line's list, like none,own,tree:31. Raises ArgumentTypeError."""
    names = tuple(text.split(","))
    for name in names:
        try:
            check(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return names
