# SPDX-License-Identifier: Apache-2.0
"""The tokenizer: lossless, the same for prompts and for whole texts, loadable by Transformers."""

import json

import pytest
from transformers import AutoTokenizer

from vllm_dflash.training.tokenizer import (
    chat_text,
    end_token_ids,
    load_tokenizer,
    save_tokenizer,
    special_id,
    train_tokenizer,
)

TEXT = 'def f(x):\n    """Return naïve → x."""\n\n    return {"a": x, "b": x + 1}\n'


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 3, "class A:\n    def g(self):\n        return self.x\n"], vocab_size=300)


def test_specials_come_first_and_vocabulary_is_exact(tokenizer):
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")
    assert [tokenizer.token_to_id(token) for token in specials] == [0, 1, 2, 3]
    assert tokenizer.get_vocab_size() == 300


def test_round_trip(tokenizer):
    for text in (TEXT, "\tx = '\x00'\r\n", "日本語 🙂", "    " * 5 + "\n\n\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_prompt_tokens_are_a_prefix_of_the_text_tokens(tokenizer):
    """A prompt that ends at a line's end must not end in a token which the whole text never has."""
    head, tail = "def f(x):\n", "    return x\n"
    assert tokenizer.encode(head + tail).ids == tokenizer.encode(head).ids + tokenizer.encode(tail).ids
    prompt, whole = chat_text(head), chat_text(head, tail)
    ids = tokenizer.encode(prompt).ids
    assert tokenizer.encode(whole).ids[: len(ids)] == ids


def test_transformers_loads_it_and_the_template_is_chatml(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    message = [{"role": "user", "content": "def f():"}]
    expected = "<|im_start|>user\ndef f():<|im_end|>\n<|im_start|>assistant\n"
    assert loaded.apply_chat_template(message, tokenize=False, add_generation_prompt=True) == expected
    assert chat_text("def f():") == expected
    answered = [*message, {"role": "assistant", "content": "    pass"}]
    expected_whole = expected + "    pass<|im_end|>\n"
    assert loaded.apply_chat_template(answered, tokenize=False) == expected_whole
    assert chat_text("def f():", "    pass") == expected_whole
    assert loaded.eos_token == "<|im_end|>"
    assert loaded(TEXT).input_ids == tokenizer.encode(TEXT).ids
    assert "\n" not in (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["mask_token"] == "<|mask|>"
    assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_ends_and_unknown_specials(tokenizer):
    assert end_token_ids(tokenizer) == [2, 0]
    with pytest.raises(ValueError, match=r"no <\|tool\|>"):
        special_id(tokenizer, "<|tool|>")


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="vocab_size=5000"):
        train_tokenizer([TEXT], vocab_size=5000)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
