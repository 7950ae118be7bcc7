# SPDX-License-Identifier: Apache-2.0
"""What the target reads: plain files and conversations cut from them, in one stream, in shuffled windows."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from vllm_dflash.training.corpus import Document, snippets
from vllm_dflash.training.tokenizer import END_OF_TEXT, chat_text


def token_stream(documents: list[Document], tokenizer: Tokenizer, chat_share: float, rng: random.Random) -> np.ndarray:
    """One pass over the documents as plain text plus conversations, shuffled, each ended by `<|endoftext|>`.

    Returns [N] uint16 token ids. `chat_share` counts characters: 0.5 gives as many in conversations as in plain text.
    """
    plain = [document.text for document in documents]
    budget = sum(map(len, plain)) * chat_share / (1 - chat_share)
    chats = [chat_text(s.head, s.tail) for document in documents for s in snippets(document, rng)]
    rng.shuffle(chats)
    texts = plain + _first_characters(chats, budget)
    rng.shuffle(texts)
    encoded = tokenizer.encode_batch([text + END_OF_TEXT for text in texts])
    return np.concatenate([np.asarray(item.ids, dtype=np.uint16) for item in encoded])


def windows(stream: np.ndarray, length: int, batch: int, rng: random.Random) -> Iterator[Tensor]:
    """Endless shuffled batches [batch, length + 1] of consecutive tokens; offsets move with every pass.

    Raises ValueError when the stream (an array [N] of token ids) is shorter than one batch needs.
    """
    if len(stream) < (batch + 1) * (length + 1):
        raise ValueError(f"corpus has {len(stream)} tokens, one batch of {batch} windows of {length + 1} needs more")
    while True:
        starts = list(range(rng.randrange(length), len(stream) - length - 1, length))
        rng.shuffle(starts)
        for i in range(0, len(starts) - batch + 1, batch):
            rows = [stream[s : s + length + 1] for s in starts[i : i + batch]]
            yield torch.from_numpy(np.stack(rows).astype(np.int64))


def _first_characters(texts: list[str], budget: float) -> list[str]:
    chosen: list[str] = []
    for text in texts:
        if budget <= 0:
            break
        budget -= len(text)
        chosen.append(text)
    return chosen
