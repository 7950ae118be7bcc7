# SPDX-License-Identifier: Apache-2.0
"""The texts of a batch on the host: what rounds add to them, where they end, who is told.

Letters: B sequences, P tokens of the longest prompt, n of the longest answer, D depths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_dflash.hf.prompts import Prompts


@dataclass(frozen=True)
class Limits:
    """Where a sequence ends: at the first stop token, which is kept, or after so many tokens."""

    max_new_tokens: int
    stop_token_ids: frozenset[int]

    def __post_init__(self) -> None:
        """Raise ValueError naming the limit."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")

    def cut(self, tokens: list[int], num_before: int) -> tuple[list[int], bool]:
        """What is kept of tokens that follow `num_before` generated ones, and whether the sequence has ended."""
        kept = tokens[: self.max_new_tokens - num_before]
        for index, token in enumerate(kept):
            if token in self.stop_token_ids:
                return kept[: index + 1], True
        return kept, num_before + len(kept) == self.max_new_tokens


def id_list(token_ids: Sequence[int] | int | None) -> list[int]:
    """One id, several or none, as a user may give them and as a generation config has them."""
    if isinstance(token_ids, int):
        return [token_ids]
    return [] if token_ids is None else [int(token) for token in token_ids]


class Sequences:
    """Each sequence's text. The target has seen all of it but its last token, the anchor."""

    def __init__(self, prompts: Prompts, first_tokens: list[int], limits: Limits) -> None:
        self.limits = limits
        self.prompts = prompts
        self.new_tokens: list[list[int]] = [[] for _ in first_tokens]
        self.acceptance_lengths: list[list[int]] = [[] for _ in first_tokens]
        self.longest = max(prompts.lengths)  # slots that any sequence uses
        self.is_active = [self._add(row, [token]) for row, token in enumerate(first_tokens)]

    @property
    def all_ended(self) -> bool:
        return not any(self.is_active)

    def append(self, report: list[list[int]]) -> None:
        """Add what a round gave, for each sequence [*accepted and more, how many count, the token after them]."""
        for row, (*ids, count, bonus) in enumerate(report):
            if self.is_active[row]:
                used = self.prompts.lengths[row] + len(self.new_tokens[row]) + count
                self.longest = max(self.longest, used)
                self.acceptance_lengths[row].append(count + 1)
                self.is_active[row] = self._add(row, [*ids[:count], bonus])

    def _add(self, row: int, tokens: list[int]) -> bool:
        """Add to a sequence's text what is kept of these; returns whether it goes on."""
        kept, ended = self.limits.cut(tokens, len(self.new_tokens[row]))
        self.new_tokens[row] += kept
        return not ended

    def joined(
        self,
        input_ids: torch.Tensor,  # [B, P]
        padding: int,
    ) -> torch.Tensor:
        """Prompts as given and what was generated, [B, P+n], as `generate` returns them."""
        longest = max(map(len, self.new_tokens))
        padded = [ids + [padding] * (longest - len(ids)) for ids in self.new_tokens]
        return torch.cat((input_ids, input_ids.new_tensor(padded)), dim=1)


class Said:
    """What a streamer has been told of the one sequence."""

    def __init__(self, streamer: Any, input_ids: torch.Tensor, sequences: Sequences) -> None:
        self.streamer, self.sequences, self.told = streamer, sequences, 0
        if streamer is not None:
            streamer.put(input_ids.cpu())
        self.update()

    def update(self) -> None:
        if self.streamer is not None:
            new = self.sequences.new_tokens[0]
            if len(new) > self.told:
                self.streamer.put(torch.tensor(new[self.told :]))
            self.told = len(new)

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()


def padding_id(target: nn.Module) -> int:
    """What stands behind a sequence that ended before others: the target's own choice."""
    config = getattr(target, "generation_config", None)
    if config is None:
        return 0
    ends = config.eos_token_id
    if config.pad_token_id is not None:
        return config.pad_token_id
    return 0 if ends is None else ends if isinstance(ends, int) else ends[0]
