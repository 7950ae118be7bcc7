# SPDX-License-Identifier: Apache-2.0
"""Which token stands for what is to be drafted: one that no text of the target contains.

The drafter reads the target's embedding of it, which is frozen. So any row will do that is never anything else.
"""

from __future__ import annotations

from typing import Any

_USUAL_NAMES = ("<|mask|>", "<|MASK|>", "<mask>", "[MASK]", "<|mask_token|>")
_KEY = "model.mask_token"


def find_mask_token(
    tokenizer: Any,
    num_embeddings: int,  # rows of the target's embedding
    wanted: str | int | None,
) -> int:
    """The id that the recipe names, else the tokenizer's mask token, else the first row that no token has.

    Raises ValueError where there is none, or where the wanted one is no row or no token.
    """
    if wanted is not None:
        return _named(tokenizer, num_embeddings, wanted)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    for name in (tokenizer.mask_token, *_USUAL_NAMES):
        if name is not None and vocabulary.get(name, num_embeddings) < num_embeddings:
            return vocabulary[name]
    taken = set(vocabulary.values())
    free = next((row for row in range(max(taken, default=-1) + 1, num_embeddings) if row not in taken), None)
    if free is None:
        raise ValueError(
            f"the target's tokenizer has no mask token, and its {len(taken)} tokens leave none of the embedding's "
            f"{num_embeddings} rows free: name a token that its texts never contain in the recipe's {_KEY}"
        )
    return free


def _named(tokenizer: Any, num_embeddings: int, wanted: str | int) -> int:
    row: int | None = tokenizer.get_vocab().get(wanted) if isinstance(wanted, str) else wanted
    if row is None:
        raise ValueError(f"{_KEY}: {wanted!r} is not one token of the target's tokenizer")
    if not 0 <= row < num_embeddings:
        raise ValueError(f"{_KEY}: {row} is not a row of the target's embedding, which has {num_embeddings}")
    return row
