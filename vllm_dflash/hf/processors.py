# SPDX-License-Identifier: Apache-2.0
"""Logits processors of Transformers, which look at the text so far: the target's way through a tree, node by node.

A row's scores depend on the tokens before it, which differ from node to node, so only the rows of the way itself are
processed: each with the text as `generate` would show it, one sequence at a time.

Letters: B sequences, N nodes of a tree, D depths, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessorList

from vllm_dflash.tree import DraftTree, Walk

if TYPE_CHECKING:
    from vllm_dflash.hf.choosing import Sampling
    from vllm_dflash.hf.prompts import Prompts
    from vllm_dflash.hf.sequences import Sequences


class ProcessedChoice:
    """The target's tokens under processors."""

    def __init__(self, processors: LogitsProcessorList, sampling: Sampling, prompts: Prompts) -> None:
        self.processors, self.sampling = processors, sampling
        self.prompts = prompts.as_given.tolist()  # padded on the left, as `generate` passes them
        self.sequences: Sequences | None = None  # as soon as there are any

    def first(
        self,
        logits: torch.Tensor,  # [B, V]
    ) -> torch.Tensor:
        """The token after each prompt, [B]."""
        return torch.cat([self._choose(text, row) for text, row in zip(self.prompts, logits, strict=True)])

    def walk(
        self,
        tree: DraftTree,
        logits: torch.Tensor,  # [B, 1+N, V]
        num_depths: int,
    ) -> Walk:
        """`vllm_dflash.tree.walk`, for scores that depend on the way. A text that has ended stays where it is."""
        sequences = self.sequences
        assert sequences is not None, "a round before there are texts"
        ways: list[list[int]] = []
        next_tokens: list[int] = []
        children = _children(tree)
        for row, text in enumerate(self.prompts):
            way: list[int] = []
            token = 0
            if sequences.is_active[row]:
                way, token = self._follow([*text, *sequences.new_tokens[row]], children[row], logits[row])
            ways.append(way)
            next_tokens.append(token)
        padded = [way + [-1] * (num_depths - len(way)) for way in ways]
        columns = (padded, [len(way) for way in ways], next_tokens)
        return Walk(*(tree.token_ids.new_tensor(column) for column in columns))

    def _follow(
        self,
        text: list[int],
        children: dict[tuple[int, int], int],
        logits: torch.Tensor,  # [1+N, V]
    ) -> tuple[list[int], int]:
        """The accepted nodes after a text, and the target's token after them."""
        way: list[int] = []
        node = -1
        while True:
            token = int(self._choose(text, logits[node + 1]))
            found = children.get((node, token))
            if found is None:
                return way, token
            node = found
            way.append(node)
            text.append(token)

    def _choose(
        self,
        text: list[int],
        logits: torch.Tensor,  # [V]
    ) -> torch.Tensor:
        ids = torch.tensor([text], device=logits.device)
        return self.sampling.choose(self.processors(ids, logits[None].float()))  # [1]


def _children(tree: DraftTree) -> list[dict[tuple[int, int], int]]:
    """For each request: the node of a token behind a parent."""
    columns = (tree.parents.tolist(), tree.token_ids.tolist(), tree.is_node.tolist())
    return [
        {(parent, token): node for node, (parent, token, real) in enumerate(zip(*rows, strict=True)) if real}
        for rows in zip(*columns, strict=True)
    ]
