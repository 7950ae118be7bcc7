# SPDX-License-Identifier: Apache-2.0
"""A drafter over part of its target's vocabulary: which tokens, their rows of the LM head, what it is taught.

A token left out can never be drafted: a block ends before it, and the target itself writes it.

Letters: N blocks a sequence, K drafted tokens a block, V vocabulary of the target, D of the drafter.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vllm_dflash.draft_vocabulary import filled_vocabulary
from vllm_dflash.hf import DFlashDraftModel
from vllm_dflash.training.anchors import IGNORED
from vllm_dflash.training.responses import Response

_KEY = "model.draft_vocab_size"


@dataclass(frozen=True)
class Coverage:
    """How many of the target's tokens can be drafted, and what share of the tokens to draft they are, 0 to 1."""

    size: int
    vocab_size: int
    share: float

    def __str__(self) -> str:
        return f"{self.size} of the target's {self.vocab_size} tokens, {self.share:.2%} of what is to be drafted"


def choose_vocabulary(responses: Iterable[Response], size: int, vocab_size: int, end_ids: Sequence[int]) -> list[int]:
    """`size` token ids, ascending: those that end a text, the commonest of the responses, then the lowest.

    Of equally common ones the lower id wins. Raises ValueError naming the recipe's key where the target has fewer
    tokens, where the end tokens are more, or where nothing of the responses could be drafted.
    """
    counts = _label_counts(responses)
    ranked = sorted(counts, key=lambda token: (-counts[token], token))
    chosen = filled_vocabulary(size, vocab_size, end_ids, ranked, _KEY)
    if counts and not any(counts[token] for token in chosen):
        raise ValueError(f"{_KEY} = {size}: none of the responses' {len(counts)} tokens has a place in it")
    return chosen


def coverage(draft: DFlashDraftModel, responses: Iterable[Response]) -> Coverage | None:
    """Of a drafter's vocabulary; None where it is the target's own."""
    if draft.draft_token_ids is None:
        return None
    counts, kept = _label_counts(responses), draft.draft_token_ids.tolist()
    share = sum(counts[token] for token in kept) / max(1, counts.total())
    return Coverage(len(kept), draft.dflash.vocab_size, share)


def _label_counts(responses: Iterable[Response]) -> Counter[int]:
    """How often each token is to be drafted: a response's first token is the target's own."""
    return Counter(itertools.chain.from_iterable(response.token_ids[1:] for response in responses))


@torch.no_grad()
def take_rows(draft: DFlashDraftModel, target: nn.Module, token_ids: Sequence[int]) -> None:
    """Make `token_ids` the drafter's vocabulary: its LM head gets their rows of the target's.

    Raises ValueError where the target's LM head has a bias, which a drafter's own has not.
    """
    head = target.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError(
            f"{_KEY} = {len(token_ids)}: the target's LM head has a bias, for which a drafter has no place"
        )
    assert draft.lm_head is not None and draft.d2t is not None
    ids = torch.tensor(token_ids)
    draft.lm_head.weight.copy_(head.weight[ids.to(head.weight.device)])
    draft.d2t.copy_(ids - torch.arange(len(ids)))


def draft_labels(
    labels: Tensor,  # [..., K] ids of the target, IGNORED where there is nothing to predict
    token_ids: Tensor,  # [D] ids of the target
    vocab_size: int,
) -> Tensor:
    """Labels as rows of the draft LM head, [..., K]: IGNORED from the first on that has no row.

    No draft gets beyond such a token, as none gets beyond the end of a text.
    """
    rows = labels.new_full((vocab_size,), IGNORED)  # [V]
    rows[token_ids] = torch.arange(len(token_ids), device=labels.device)
    known = labels != IGNORED
    found = rows[labels.where(known, 0)]
    ended = (known & (found == IGNORED)).cumsum(dim=-1) > 0
    return found.masked_fill(ended | ~known, IGNORED)
