# SPDX-License-Identifier: Apache-2.0
"""What is asked of a model: one turn, or several where each follows the model's own answer to the one before."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Conversation:
    """turns: what the user says. history: messages with role and content that come before the first turn."""

    name: str
    turns: tuple[str, ...]
    history: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class PromptSet:
    """source: a file or a hub's repository. revision: the commit of the repository that was read."""

    name: str
    conversations: tuple[Conversation, ...]
    source: str
    revision: str | None = None


def chosen(conversations: Sequence[Conversation], count: int | None, seed: int) -> tuple[Conversation, ...]:
    """`count` of them, drawn by the seed and in their own order; all of them if there are no more."""
    if count is None or count >= len(conversations):
        return tuple(conversations)
    indices = sorted(random.Random(seed).sample(range(len(conversations)), count))
    return tuple(conversations[index] for index in indices)
