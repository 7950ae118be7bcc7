# SPDX-License-Identifier: Apache-2.0
"""Prompt sets by name: the small one in this package, published ones from the hub, and the user's own files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from vllm_dflash.benchmark.sets.conversations import Conversation, PromptSet, chosen
from vllm_dflash.benchmark.sets.hub import HUB_SETS, cache_directory, load_hub_set
from vllm_dflash.benchmark.sets.jsonl import read_conversations

__all__ = ["Conversation", "PromptSet", "load_prompt_set"]

MINI = "mini"


def load_prompt_set(name: str, count: int | None, seed: int, revisions: Mapping[str, str]) -> PromptSet:
    """`count` conversations of a set, drawn by the seed. revisions: by name of a hub's set.

    Raises ValueError that names the set, or the file's line.
    """
    found = _whole_set(name, revisions.get(name))
    return replace(found, conversations=chosen(found.conversations, count, seed))


def _whole_set(name: str, revision: str | None) -> PromptSet:
    if name == MINI:
        return PromptSet(MINI, read_conversations(Path(__file__).with_name("mini.jsonl")), "shipped with vllm_dflash")
    if name in HUB_SETS:
        return load_hub_set(name, revision, cache_directory())
    path = Path(name)
    if path.suffix != ".jsonl":
        raise ValueError(f"--dataset {name}: not a .jsonl file, and the known sets are {MINI}, {', '.join(HUB_SETS)}")
    if not path.is_file():
        raise ValueError(f"--dataset {name}: there is no such file")
    return PromptSet(path.stem, read_conversations(path), name)
