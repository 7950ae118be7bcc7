# SPDX-License-Identifier: Apache-2.0
"""Prompts: cut from the right files, of the right lengths, and readable again."""

import random

import pytest

from vllm_dflash.training import prompt_files
from vllm_dflash.training.corpus import Document
from vllm_dflash.training.prompts import (
    Prompt,
    chat_prompts,
    held_out_prompts,
    raw_prompts,
    read_prompts,
    write_prompts,
    write_user_prompts,
)
from vllm_dflash.training.tokenizer import train_tokenizer

FUNCTION = """def NAME_NUMBER(first, second):
    '''Add two numbers and NUMBER: quick, brown, lazy.'''
    total = first + second
    return total + NUMBER
"""


def source(name: str) -> str:
    functions = [FUNCTION.replace("NAME", name).replace("NUMBER", str(number)) for number in range(30)]
    return "import os\n\n\n" + "\n\n".join(functions)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([source("a"), source("b")], vocab_size=300)


def test_raw_prompts_are_whole_lines_of_the_file_within_the_limit(tokenizer):
    document = Document("a.py", source("a"), True)
    prompts = list(raw_prompts([document], tokenizer, 100, random.Random(0)))
    assert prompts
    for prompt in prompts:
        assert len(prompt.prompt_token_ids) <= 100
        assert f"\n{prompt.text}" in f"\n{document.text}" and prompt.text.endswith("\n")
        assert tokenizer.decode(prompt.prompt_token_ids) == prompt.text


def test_chat_prompts_hold_the_head_as_the_user_message(tokenizer):
    prompts = list(chat_prompts([Document("a.py", source("a"), True)], tokenizer, random.Random(0)))
    assert len(prompts) == 30
    text = tokenizer.decode(prompts[0].prompt_token_ids, skip_special_tokens=False)
    assert text == f"<|im_start|>user\n{prompts[0].text}<|im_end|>\n<|im_start|>assistant\n"
    assert prompts[0].text.startswith("def a_0(first, second):\n    '''Add two numbers and 0: quick, brown, lazy.'''")


def test_held_out_prompts_take_turns_between_files(tokenizer, tmp_path):
    documents = [Document("a.py", source("a"), True), Document("b.py", source("b"), True)]
    prompts = held_out_prompts(documents, tokenizer, 8, seed=0)
    assert [prompt.kind for prompt in prompts] == ["chat"] * 4 + ["raw"] * 4
    assert {kind: sum(p.source == "a.py" for p in prompts if p.kind == kind) for kind in ("chat", "raw")} == {
        "chat": 2,
        "raw": 2,
    }
    assert all(40 <= len(prompt.prompt_token_ids) <= 200 for prompt in prompts)
    assert len({prompt.id for prompt in prompts}) == 8
    write_prompts(prompts, tmp_path / "p.jsonl")
    assert read_prompts(tmp_path / "p.jsonl") == prompts


def test_training_file_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"b\.py is a training file"):
        held_out_prompts([Document("b.py", source("b"), False)], tokenizer, 2, seed=0)


def test_too_few_prompts_are_refused(tokenizer):
    with pytest.raises(ValueError, match="1000 are needed"):
        held_out_prompts([Document("a.py", source("a"), True)], tokenizer, 2000, seed=0)


def test_what_is_written_is_read_back(tmp_path):
    prompt = Prompt("1", "raw", "one\u2028two\u0085three", [5], "a.py")
    write_prompts([prompt], tmp_path / "prompts.jsonl")
    assert read_prompts(tmp_path / "prompts.jsonl") == [prompt]


def test_bad_record_names_file_and_line(tmp_path):
    (tmp_path / "p.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"p\.jsonl:1"):
        read_prompts(tmp_path / "p.jsonl")


def test_user_prompts_are_those_of_the_training_command(tmp_path):
    file = tmp_path / "prompts.jsonl"
    write_user_prompts([Prompt("1", "chat", "def f():", [1], "a.py"), Prompt("2", "raw", "é = 1", [2], "a.py")], file)
    chat, raw = prompt_files.read_prompts(str(file))
    assert (chat.id, chat.messages) == ("1", ({"role": "user", "content": "def f():"},))
    assert (raw.id, raw.messages, raw.text) == ("2", None, "é = 1")


def test_a_cut_writing_leaves_no_file(tmp_path):
    def prompts():
        yield Prompt("1", "raw", "a", [1], "a.py")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_user_prompts(prompts(), tmp_path / "prompts.jsonl")
    assert not (tmp_path / "prompts.jsonl").exists()
