# SPDX-License-Identifier: Apache-2.0
"""A small byte-level BPE tokenizer with a ChatML template, in the files that Transformers and vLLM load."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
MASK = "<|mask|>"  # fills the unknown rows of a draft block; never in any text
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, MASK)
VOCAB_SIZE = 2048
MAX_LENGTH = 1024
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Learn the merges. Specials take ids 0..3 and count towards `vocab_size`.

    Raises ValueError when the texts are too few for that many merges: the embedding would have dead rows.
    """
    tokenizer = Tokenizer(models.BPE())
    # A line break is a token of its own. Merged with the next line's indentation, it would be another token at the end
    # of a prompt than inside a text, and the model would never have seen what prompts end with.
    lines = pre_tokenizers.Split(Regex("\n"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"corpus gives {tokenizer.get_vocab_size()} tokens, vocab_size={vocab_size} needs more text")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int = MAX_LENGTH) -> None:
    """Write `tokenizer.json` (compact) and `tokenizer_config.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    compact = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(compact, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "mask_token": MASK,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer saved in `folder`. Raises FileNotFoundError naming the missing file."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no tokenizer there")
    return Tokenizer.from_file(str(file))


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token. Raises ValueError when the tokenizer lacks it."""
    index = tokenizer.token_to_id(token)
    if index is None:
        raise ValueError(f"the tokenizer has no {token}")
    return index


def end_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids that end a response: of `<|im_end|>` (chat) and `<|endoftext|>` (plain text)."""
    return [special_id(tokenizer, token) for token in (IM_END, END_OF_TEXT)]


def chat_text(user: str, assistant: str | None = None) -> str:
    """One exchange in ChatML; without `assistant` it ends where the model is to answer.

    Says in Python what CHAT_TEMPLATE says in Jinja, so that training data needs no template engine.
    """
    prompt = f"{IM_START}user\n{user}{IM_END}\n{IM_START}assistant\n"
    return prompt if assistant is None else f"{prompt}{assistant}{IM_END}\n"
