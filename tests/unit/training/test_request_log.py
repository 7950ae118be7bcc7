# SPDX-License-Identifier: Apache-2.0
"""Request logs: what is written is what was asked, once, in order, and whatever is left out is counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_dflash.training.prompt_files import UserPrompt, read_prompts
from vllm_dflash.training.request_log import CollectReport, collect

HELLO = {"role": "user", "content": "Hello"}
CHAT = {"model": "m", "messages": [HELLO], "temperature": 0}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]}


def log(directory: Path, *lines: Any, name: str = "requests.log") -> Path:
    """Objects are logged as JSON, strings and bytes as they are."""
    file = directory / name
    raw = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    file.write_bytes(b"\n".join(raw) + b"\n")
    return file


def written(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "line",
    [
        CHAT,
        {"body": CHAT},
        {"request": CHAT},
        {"request_body": CHAT},
        {"custom_id": "r-1", "method": "POST", "url": "/v1/chat/completions", "body": CHAT},
        {"time": 1, "request": {"method": "POST", "body": CHAT}},
        {"body": json.dumps(CHAT)},
        {"request": {"body": json.dumps(CHAT)}},
        {"request": "POST /v1/chat/completions HTTP/1.1", "request_body": CHAT},
        {"id": "chatcmpl-1", "messages": [HELLO, {"role": "assistant", "content": "Hi."}], "prompt": None},
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
            "tools": [],
            "functions": None,
        },
    ],
)
def test_where_a_request_may_be(tmp_path: Path, line: Any) -> None:
    file, output = log(tmp_path, line), tmp_path / "p.jsonl"
    assert collect([file], output) == CollectReport(1, 0, {}, None)
    assert written(output) == [{"id": f"{file}:1", "messages": [HELLO]}]


def test_two_logs_to_prompts_and_back(tmp_path: Path) -> None:
    first = log(
        tmp_path,
        {"prompt": "def f():\n", "max_tokens": 8},
        CHAT,
        "",
        {"body": {"prompt": ["one \u2028 é", "def f():\n", "two"]}},
        {"prompt": "Hello"},
        name="first.log",
    )
    second = log(
        tmp_path,
        {"messages": [HELLO, {"role": "assistant", "content": "Another answer"}]},
        {"messages": [HELLO, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Bye"}]},
        {"prompt": "two"},
        {"prompt": "two "},
        name="second.log",
    )
    output = tmp_path / "p.jsonl"
    assert collect([first, second], output) == CollectReport(written=7, duplicates=3, skipped={}, first_malformed=None)
    turns = ({**HELLO}, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Bye"})
    assert list(read_prompts(str(output))) == [
        UserPrompt(f"{first}:1", None, "def f():\n"),
        UserPrompt(f"{first}:2", (HELLO,), None),
        UserPrompt(f"{first}:4:0", None, "one \u2028 é"),
        UserPrompt(f"{first}:4:2", None, "two"),
        UserPrompt(f"{first}:5", None, "Hello"),  # no duplicate: raw text is not the same as a message
        UserPrompt(f"{second}:2", turns, None),
        UserPrompt(f"{second}:4", None, "two "),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.log", "p.jsonl", "second.log"]


def test_everything_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    file = log(
        tmp_path,
        CHAT,
        {"input": "an embedding"},
        {"body": {"request": {"body": CHAT}}},  # a level too deep
        [CHAT],
        "7",
        {"body": 7},
        "{'single': 'quotes'}",
        b'{"prompt": "\xe9"}',
        "[" * 100_000,
        {"body": '{"messages": [{"role": "us'},
        {"prompt": [1, 2, 3]},
        {"prompt": [[1, 2], [3]]},
        {"messages": [IMAGE]},
        {**CHAT, "tools": [{"type": "function"}]},
        {**CHAT, "functions": [{"name": "f"}]},
        {"messages": [HELLO, {"role": "assistant", "tool_calls": [{}]}, {"role": "tool", "content": "4"}]},
        {"prompt": " "},
        {"prompt": []},
        {"prompt": ["good", ""]},
        {"messages": []},
        {"messages": "Hello"},
        {"prompt": {"a": 1}},
        {"prompt": ["a", 1]},
        {"prompt": "\ud83d"},
    )
    output = tmp_path / "p.jsonl"
    assert collect([file], output) == CollectReport(
        written=2,
        duplicates=0,
        skipped={
            "not a request": 5,
            "not JSON": 3,
            "body not JSON": 1,
            "token ids": 2,
            "images or other parts that are not text": 1,
            "tools or tool calls": 3,
            "empty prompt": 4,
            "malformed": 3,
            "not valid Unicode": 1,
        },
        first_malformed=f"{file}:7",
    )
    assert written(output) == [
        {"id": f"{file}:1", "messages": [HELLO]},
        {"id": f"{file}:19:0", "prompt": "good"},
    ]


def test_max_prompts_counts_what_is_written_and_ends_the_reading(tmp_path: Path) -> None:
    file = log(tmp_path, {"prompt": "a"}, {"prompt": "a"}, {"prompt": "b"}, "not read", {"prompt": "c"})
    output = tmp_path / "p.jsonl"
    assert collect([file], output, max_prompts=2) == CollectReport(2, 1, {}, None)
    assert [record["prompt"] for record in written(output)] == ["a", "b"]


def test_nothing_usable_names_the_files_and_the_reasons(tmp_path: Path) -> None:
    first = log(tmp_path, "{", {"prompt": [1]}, name="a.log")
    second = log(tmp_path, "}", name="b.log")
    output = tmp_path / "p.jsonl"
    output.write_text("before")
    with pytest.raises(ValueError) as caught:
        collect([first, second], output, overwrite=True)
    assert str(caught.value) == (
        f"{first}, {second}: no prompt to train on: 2 x not JSON, 1 x token ids; the first that is not JSON: {first}:1"
    )
    assert output.read_text() == "before"
    assert not (tmp_path / "p.jsonl.partial").exists()


def test_empty_log(tmp_path: Path) -> None:
    file = log(tmp_path, "")
    with pytest.raises(ValueError, match=r"requests\.log: no prompt to train on: no lines$"):
        collect([file], tmp_path / "p.jsonl")


def test_an_output_is_only_overwritten_on_request(tmp_path: Path) -> None:
    file, output = log(tmp_path, CHAT), tmp_path / "p.jsonl"
    output.write_text("before")
    with pytest.raises(ValueError, match=r"p\.jsonl: exists already; ask to overwrite it, or name another file$"):
        collect([file], output)
    assert output.read_text() == "before"
    collect([file], output, overwrite=True)
    assert written(output) == [{"id": f"{file}:1", "messages": [HELLO]}]


def test_output_appears_only_when_complete(tmp_path: Path) -> None:
    """The second log cannot be read, after the first was."""
    output = tmp_path / "p.jsonl"
    with pytest.raises(ValueError, match=r"b\.log: cannot be read: No such file or directory$"):
        collect([log(tmp_path, CHAT), tmp_path / "b.log"], output)
    assert [path.name for path in tmp_path.iterdir()] == ["requests.log"]


def test_wrong_arguments(tmp_path: Path) -> None:
    file = log(tmp_path, CHAT, name="requests.jsonl")
    with pytest.raises(ValueError, match="^no request log is given$"):
        collect([], tmp_path / "p.jsonl")
    with pytest.raises(ValueError, match=r"p\.txt: the name ends in '\.txt'; prompts are read again from \.jsonl"):
        collect([file], tmp_path / "p.txt")
    with pytest.raises(ValueError, match=r"nowhere/p\.jsonl: there is no directory .*nowhere$"):
        collect([file], tmp_path / "nowhere" / "p.jsonl")
    with pytest.raises(ValueError, match=r"requests\.jsonl: is one of the logs and would be overwritten$"):
        collect([file], tmp_path / "." / "requests.jsonl", overwrite=True)
    with pytest.raises(ValueError, match="^max_prompts is 0; at least 1 prompt must be wanted$"):
        collect([file], tmp_path / "p.jsonl", max_prompts=0)
    assert written(file) == [CHAT]


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"p\.jsonl: cannot be written: Is a directory$"):
        collect([log(tmp_path, CHAT)], tmp_path / "p.jsonl", overwrite=True)
