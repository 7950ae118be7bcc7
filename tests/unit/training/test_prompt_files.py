# SPDX-License-Identifier: Apache-2.0
"""The user's prompts: every layout that is read, and for every bad record a message that says where it is."""

import json
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dflash.console import SHIPPED_PAIR
from vllm_dflash.training.prompt_files import UserPrompt, prompt_token_ids, read_prompts

HELLO = {"role": "user", "content": "Hello"}


def jsonl(directory: Path, *records: Any) -> str:
    file = directory / "p.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(file)


def error_of(source: str) -> str:
    with pytest.raises(ValueError) as caught:
        list(read_prompts(source))
    return str(caught.value)


# Records.


@pytest.mark.parametrize(
    ("record", "messages", "text"),
    [
        ({"messages": [HELLO]}, (HELLO,), None),
        ({"messages": [HELLO, {"role": "assistant", "content": "Hi."}]}, (HELLO,), None),
        ({"messages": [HELLO, {"role": "assistant", "content": None, "tool_calls": [{}]}]}, (HELLO,), None),
        ({"messages": [HELLO, *[{"role": "assistant", "content": "Hi."}] * 2]}, (HELLO,), None),
        (
            {"messages": [{"role": "system", "content": ""}, HELLO, {"role": "assistant", "content": "Hi."}, HELLO]},
            ({"role": "system", "content": ""}, HELLO, {"role": "assistant", "content": "Hi."}, HELLO),
            None,
        ),
        ({"messages": [{**HELLO, "tool_calls": None, "name": "x"}]}, (HELLO,), None),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            ({"role": "user", "content": "a\nb"},),
            None,
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be short."},
                    {"from": "human", "value": "Hello"},
                    {"from": "gpt", "value": "Hi."},
                    {"from": "human", "value": "Bye"},
                    {"from": "gpt", "value": "Bye."},
                ]
            },
            (
                {"role": "system", "content": "Be short."},
                HELLO,
                {"role": "assistant", "content": "Hi."},
                {"role": "user", "content": "Bye"},
            ),
            None,
        ),
        ({"prompt": "  def f():\n"}, None, "  def f():\n"),
        ({"prompt": [HELLO]}, (HELLO,), None),
        ({"text": "one\u2028line"}, None, "one\u2028line"),
        ({"messages": None, "prompt": None, "text": "t"}, None, "t"),
        ({"text": "t", "prompt": "p", "messages": [HELLO]}, (HELLO,), None),
        ({"id": "", "text": "t"}, None, "t"),
    ],
)
def test_layouts(tmp_path: Path, record: dict[str, Any], messages: Any, text: str | None) -> None:
    assert list(read_prompts(jsonl(tmp_path, record))) == [UserPrompt("p.jsonl:1", messages, text)]


def test_ids_are_the_records_own_or_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(
        '\ufeff{"text": "a"}\r\n\n  \n{"text": "b"}\n{"text": "c", "id": "mine"}\n{"text": "d", "id": 7}', "utf-8"
    )
    assert [(prompt.id, prompt.text) for prompt in read_prompts(str(file))] == [
        ("p.json:1", "a"),
        ("p.json:4", "b"),
        ("mine", "c"),
        ("p.json:6", "d"),
    ]


def test_unescaped_unicode_line_ends_do_not_end_a_line(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes('{"text": "a\u2028b\u0085c"}\n'.encode())
    assert [prompt.text for prompt in read_prompts(str(file))] == ["a\u2028b\u0085c"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "not a JSON object but [1]: one record a line is expected"),
        (
            {"question": "q", "prompt": None},
            "a prompt under none of messages, conversations, prompt, text; the keys found: ['question', 'prompt']",
        ),
        ({"messages": "q"}, "messages is 'q', not a list of messages"),
        ({"conversations": {}}, "conversations is {}, not a list of turns"),
        ({"prompt": 7}, "prompt is 7, not text or a list of messages"),
        ({"text": ["q"]}, "text is ['q'], not text"),
        ({"text": " \n"}, "text is blank: ' \\n'"),
        ({"prompt": ""}, "prompt is blank: ''"),
        ({"messages": []}, "messages holds no user message with text: []"),
        (
            {"messages": [{"role": "user", "content": " "}]},
            "messages holds no user message with text: [{'role': 'user', 'content': ' '}]",
        ),
        (
            {"conversations": [{"from": "gpt", "value": "Hi."}]},
            "conversations holds no user message with text: [{'from': 'gpt', 'value': 'Hi.'}]",
        ),
        ({"messages": ["q"]}, "messages[0] is 'q', not an object with role and content"),
        ({"conversations": ["q"]}, "conversations[0] is 'q', not an object with from and value"),
        (
            {"messages": [HELLO, {"role": "User", "content": "q"}]},
            "messages[1].role is 'User', not one of system, developer, user, assistant",
        ),
        ({"prompt": [{"role": []}]}, "prompt[0].role is [], not one of system, developer, user, assistant"),
        (
            {"conversations": [{"from": "bing", "value": "q"}]},
            "conversations[0].from is 'bing', not one of human, gpt, system",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0].content is None, not text"),
        ({"conversations": [{"from": "human", "value": 7}]}, "conversations[0].value is 7, not text"),
        (
            {"messages": [HELLO, {"role": "tool", "content": "4"}]},
            "messages[1].role is 'tool': results of tools cannot be replayed",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{}]}, HELLO]},
            "messages[0].tool_calls is [{}]: tool calls cannot be replayed",
        ),
        (
            {"messages": [{"role": "assistant", "function_call": {"name": "f"}}, HELLO]},
            "messages[0].function_call is {'name': 'f'}: tool calls cannot be replayed",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
            "messages[0].content[1].type is 'image_url': only parts of type 'text' are read",
        ),
        (
            {"messages": [{"role": "user", "content": ["a"]}]},
            "messages[0].content[0] is 'a', not an object with type and text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text is None, not text",
        ),
        ({"text": "a\ud83d"}, "text is not valid Unicode, it holds half a surrogate pair: 'a\\ud83d'"),
        ({"messages": "q" * 100}, f"messages is '{'q' * 79}..., not a list of messages"),
    ],
)
def test_bad_record_names_line_key_and_value(tmp_path: Path, record: Any, message: str) -> None:
    file = jsonl(tmp_path, {"text": "a good one"}, record)
    assert error_of(file) == f"{file}:2: {message}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "not JSON: Expecting value: line 1 column 10 (char 9) in '{\"text\":'"),
        ("[" * 100_000, "not JSON: maximum recursion depth exceeded"),
    ],
)
def test_malformed_json_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(f'\n{{"text": "a"}}\n{line}')
    assert error_of(str(file)).startswith(f"{file}:3: {message}")


# Sources.


def test_reading_is_lazy(tmp_path: Path) -> None:
    prompts = read_prompts(jsonl(tmp_path, {"text": "a"}, {"bad": 1}))
    assert [prompt.text for prompt in islice(prompts, 1)] == ["a"]


def test_paragraphs_of_a_text_file(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes("\n\nfirst,\r\n  indented \r\n\r\n \t\nsecond \u00e9\n\n\nthird".encode())
    assert list(read_prompts(str(file))) == [
        UserPrompt("p.txt:3", None, "first,\n  indented "),
        UserPrompt("p.txt:7", None, "second \u00e9"),
        UserPrompt("p.txt:10", None, "third"),
    ]


@pytest.mark.parametrize("name", ["p.jsonl", "p.txt"])
def test_file_without_prompts(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n \n")
    assert error_of(f"{tmp_path}/{name}") == f"{tmp_path}/{name}: there are no prompts in it"


@pytest.mark.parametrize("name", ["p.jsonl", "p.txt"])
def test_file_that_is_not_utf8(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes('\n{"text": "é"}'.encode("latin-1"))
    assert error_of(f"{tmp_path}/{name}").startswith(f"{tmp_path}/{name}:2: not UTF-8: 'utf-8' codec can't decode")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = jsonl(tmp_path, {"text": "a"})

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert error_of(file) == f"{file}: cannot be read: Permission denied"


def test_a_wrong_source_is_refused_before_reading(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"p\.jsonl: there is no such file$"):
        read_prompts(str(tmp_path / "p.jsonl"))
    with pytest.raises(ValueError, match=r"p\.csv: the name ends in '\.csv'; prompts are read from a \.jsonl, "):
        read_prompts(str(tmp_path / "p.csv"))


# The hub.


@pytest.mark.parametrize(
    ("source", "name", "revision", "split"),
    [
        ("hub:org/set", "org/set", None, "train"),
        ("hub:org/set@v1.0", "org/set", "v1.0", "train"),
        ("hub:org/set:test_sft", "org/set", None, "test_sft"),
        ("hub:org/set@refs/pr/1:test", "org/set", "refs/pr/1", "test"),
    ],
)
def test_hub_source(monkeypatch: pytest.MonkeyPatch, source: str, name: str, revision: str | None, split: str) -> None:
    asked = []

    def load_dataset(path: str, **options: Any) -> Any:
        asked.append((path, options))
        return iter([{"messages": [HELLO], "text": None}, {"prompt": "p", "id": "mine"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert list(read_prompts(source)) == [UserPrompt(f"{name}:0", (HELLO,), None), UserPrompt("mine", None, "p")]
    assert asked == [(name, {"revision": revision, "split": split, "streaming": True})]


def test_data_set_read_by_datasets_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "set"
    directory.mkdir()
    (directory / "train.jsonl").write_text(json.dumps({"messages": [HELLO], "tools": None}) + "\n")
    (directory / "test.jsonl").write_text(json.dumps({"messages": [HELLO, HELLO], "tools": None}) + "\n")
    assert list(read_prompts(f"hub:{directory}")) == [UserPrompt(f"{directory}:0", (HELLO,), None)]
    assert list(read_prompts(f"hub:{directory}:test")) == [UserPrompt(f"{directory}:0", (HELLO, HELLO), None)]
    assert error_of(f"hub:{directory}:dev").startswith(f"hub:{directory}:dev: cannot be read: Bad split: dev")


def test_bad_row_names_data_set_and_index(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "a"}, {"text": " "}]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: rows))
    assert error_of("hub:org/set:test") == "hub:org/set:test: row 1: text is blank: ' '"
    rows.clear()
    assert error_of("hub:org/set") == "hub:org/set: there are no prompts in it"


def test_data_set_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("Dataset 'org/set' doesn't exist on the Hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert error_of("hub:org/set") == "hub:org/set: cannot be read: Dataset 'org/set' doesn't exist on the Hub"


def test_datasets_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert error_of("hub:org/set") == "hub:org/set: needs the package datasets: pip install 'vllm-dflash[train]'"


@pytest.mark.parametrize("source", ["hub:", "hub:set@", "hub:set:a:b", "hub:set:test@main"])
def test_hub_source_that_is_none(source: str) -> None:
    assert error_of(source) == f"{source}: not hub:NAME[@REVISION][:SPLIT]"


# Token ids.


@pytest.fixture(scope="module")
def shared_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHIPPED_PAIR / "target")


@pytest.fixture
def tokenizer(shared_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The shipped one, whose chat template a test may change."""
    monkeypatch.setattr(shared_tokenizer, "chat_template", shared_tokenizer.chat_template)
    return shared_tokenizer


def test_messages_go_through_the_chat_template(tokenizer: Any) -> None:
    messages = ({"role": "system", "content": "Be short."}, {"role": "user", "content": "def f(x):\n    pass"})
    ids = prompt_token_ids(UserPrompt("a:1", messages, None), tokenizer, {})
    rendered = (
        "<|im_start|>system\nBe short.<|im_end|>\n"
        "<|im_start|>user\ndef f(x):\n    pass<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert type(ids) is list and all(type(token) is int for token in ids)
    assert ids == tokenizer.encode(rendered, add_special_tokens=False)
    assert tokenizer.decode(ids) == rendered
    assert rendered == tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)


def test_chat_template_arguments_reach_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0].content }}{% if enable_thinking is false %}, no thinking{% endif %}"
    prompt = UserPrompt("a:1", (HELLO,), None)
    assert tokenizer.decode(prompt_token_ids(prompt, tokenizer, {"enable_thinking": False})) == "Hello, no thinking"
    assert tokenizer.decode(prompt_token_ids(prompt, tokenizer, {})) == "Hello"


def test_text_is_read_as_it_is_with_the_special_tokens_of_the_tokenizer(tokenizer: Any) -> None:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    text = "def f(x):\n    return x\n"
    plain = Tokenizer.from_file(str(SHIPPED_PAIR / "target" / "tokenizer.json"))
    assert prompt_token_ids(UserPrompt("a:1", None, text), tokenizer, {}) == plain.encode(text).ids
    with_start = Tokenizer.from_str(plain.to_str())
    with_start.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    ids = prompt_token_ids(UserPrompt("a:1", None, text), PreTrainedTokenizerFast(tokenizer_object=with_start), {})
    assert ids == [1, *plain.encode(text).ids]


def test_messages_without_a_chat_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"^a:1: the tokenizer '.*target' has no chat template .* give raw prompts"):
        prompt_token_ids(UserPrompt("a:1", (HELLO,), None), tokenizer, {})
    assert prompt_token_ids(UserPrompt("a:1", None, "hi"), tokenizer, {}) == [75, 76]
    given = {"chat_template": "{{ messages[0].content }}"}
    assert tokenizer.decode(prompt_token_ids(UserPrompt("a:1", (HELLO,), None), tokenizer, given)) == "Hello"


def test_messages_that_the_chat_template_refuses(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"^a:1: the chat template refuses the messages: roles must alternate$"):
        prompt_token_ids(UserPrompt("a:1", (HELLO,), None), tokenizer, {})


def test_chat_template_arguments_that_are_not_the_users(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="^chat template arguments: tokenize = False cannot be chosen$"):
        prompt_token_ids(UserPrompt("a:1", (HELLO,), None), tokenizer, {"tokenize": False})
