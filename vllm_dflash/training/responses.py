# SPDX-License-Identifier: Apache-2.0
"""Responses of the target itself: the drafter learns to guess this target, not the corpus (paper, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Response:
    """One training sequence: prompt and response token ids. temperature: 0.0 for greedy."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    temperature: float

    @property
    def sequence(self) -> list[int]:
        """Prompt and response."""
        return self.prompt_token_ids + self.token_ids


def until_end(row: list[int], end_ids: list[int]) -> list[int]:
    """Up to the first end token, which stays."""
    for index, token in enumerate(row):
        if token in end_ids:
            return row[: index + 1]
    return row
