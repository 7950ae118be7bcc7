# SPDX-License-Identifier: Apache-2.0
"""The target's training text: its mix, and windows that are consecutive pieces of it."""

import random

import numpy as np
import pytest

from vllm_dflash.training.corpus import Document
from vllm_dflash.training.text_stream import token_stream, windows
from vllm_dflash.training.tokenizer import train_tokenizer

SOURCE = "".join(f"def f{i}(x):\n    y = x + {i}\n    z = y * {i}\n    return z\n\n\n" for i in range(40))


def test_stream_holds_every_file_and_about_as_much_chat():
    tokenizer = train_tokenizer([SOURCE], vocab_size=270)
    stream = token_stream([Document("a.py", SOURCE, False)], tokenizer, chat_share=0.5, rng=random.Random(0))
    texts = tokenizer.decode(stream.tolist(), skip_special_tokens=False).split("<|endoftext|>")
    assert texts.pop() == ""  # the stream ends with the token
    assert SOURCE in texts
    chats = [text for text in texts if text != SOURCE]
    assert all(text.startswith("<|im_start|>user\ndef f") and text.endswith("return z<|im_end|>\n") for text in chats)
    assert 1.0 <= sum(map(len, chats)) / len(SOURCE) < 1.1  # the last one goes over the half


def test_windows_are_consecutive_and_overlap_by_the_label_only():
    batches = windows(np.arange(1000, dtype=np.uint16), length=9, batch=4, rng=random.Random(0))
    rows = [row for _ in range(27) for row in next(batches).tolist()]  # one pass: 110 or 111 windows, 27 batches
    assert all(row == list(range(row[0], row[0] + 10)) for row in rows)
    starts = [row[0] for row in rows]
    assert len(set(starts)) == 108 and len({start % 9 for start in starts}) == 1
    assert starts != sorted(starts)


def test_stream_too_short_for_a_batch_is_refused():
    with pytest.raises(ValueError, match="corpus has 40 tokens"):
        next(windows(np.zeros(40, dtype=np.uint16), length=9, batch=4, rng=random.Random(0)))
