# SPDX-License-Identifier: Apache-2.0
"""examples/ray_batch without Ray: what is read, whose an output folder is, and what is joined."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ray_batch"
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'vllm-dflash[ray]'"
)


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLE)
    import shards

    return shards


def batch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command itself. What it refuses, it refuses before Ray starts: in a second, not in ten."""
    command = [sys.executable, str(EXAMPLE / "batch.py"), "--address", "local", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def write(file: Path, *records: Any) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_ids_of_rows_stay_as_they_are(shards: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"id": 0, "prompt": "a"}\n\n{"text": "b\u2028"}\n{"id": "c", "messages": [' + turn("system"))
    file.write_text(file.read_text() + ", " + turn("user") + "]}\n")
    assert shards.read_rows(file) == [
        {"line": 1, "id": 0, "messages": [{"role": "user", "content": "a"}]},
        {"line": 3, "id": 3, "messages": [{"role": "user", "content": "b\u2028"}]},
        {"line": 4, "id": "c", "messages": [{"role": r, "content": "hi"} for r in ("system", "user")]},
    ]


def turn(role: str) -> str:
    return json.dumps({"role": role, "content": "hi"})


def test_shards_are_named_by_their_rows(shards: ModuleType) -> None:
    rows = [{"line": number} for number in range(1, 6)]
    assert shards.cut(rows, 2) == {
        "000000000-000000001.json": [{"line": 1}, {"line": 2}],
        "000000002-000000003.json": [{"line": 3}, {"line": 4}],
        "000000004-000000004.json": [{"line": 5}],
    }


@needs_ray
@pytest.mark.parametrize(
    ("second_line", "told"),
    [
        ("{'prompt': 'x'}", "prompts.jsonl:2: not JSON"),
        ('{"id": 1}', "prompts.jsonl:2: none of the keys turns, messages, prompt, text"),
        ('{"turns": ["a", "b"]}', "prompts.jsonl:2: 2 turns: one prompt a line is needed"),
    ],
)
def test_a_bad_line_is_named_before_anything_starts(tmp_path: Path, second_line: str, told: str) -> None:
    file = write(tmp_path / "prompts.jsonl", {"prompt": "x"})
    file.write_text(file.read_text() + second_line + "\n")
    done = batch("--input", str(file), "--output", str(tmp_path / "out"))
    assert done.returncode == 1
    assert told in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@needs_ray
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--sampling", "{top_p: 1}"], "--sampling: {top_p: 1}: not JSON"),
        (["--sampling", '{"seed": 1}'], "--sampling: seed is set by this script itself"),
        (["--engine-args", '{"model": "x"}'], "--engine-args: model is set by this script itself"),
        (["--rows-per-shard", "0"], "--rows-per-shard: 0: 1 or more is needed"),
        (["--target", "/nowhere", "--drafter", "/nowhere"], "--target: there is no directory /nowhere"),
    ],
)
def test_a_bad_option_is_named(tmp_path: Path, arguments: list[str], told: str) -> None:
    file = write(tmp_path / "prompts.jsonl", {"prompt": "x"})
    done = batch("--input", str(file), "--output", str(tmp_path / "out"), *arguments)
    assert done.returncode != 0
    assert told in done.stderr and "Traceback" not in done.stderr


def claim(shards: ModuleType, output: Path, source: Path, **settings: Any) -> Any:
    return shards.claimed(output, shards.read_rows(source), {"max_tokens": 8, "sampling": {"top_p": 1.0}} | settings)


def test_a_folder_of_another_job_is_refused(shards: ModuleType, tmp_path: Path) -> None:
    output, source = tmp_path / "out", write(tmp_path / "a.jsonl", {"prompt": "x"})
    with claim(shards, output, source):
        (output / "shards").mkdir()
    with claim(shards, output, source):
        pass
    with pytest.raises(ValueError, match=rf"{output} is of another run: max_tokens was 8 there and is 9 now"):
        claim(shards, output, source, max_tokens=9).__enter__()
    with pytest.raises(ValueError, match=r"sampling.top_p was 1.0 there and is 0.9 now"):
        claim(shards, output, source, sampling={"top_p": 0.9}).__enter__()
    other = write(tmp_path / "b.jsonl", {"prompt": "y"})
    with pytest.raises(ValueError, match=r"rows_sha256 was '\w+' there and is '\w+' now. Choose another --output"):
        claim(shards, output, other).__enter__()
    with claim(shards, output, write(tmp_path / "c.jsonl", {"text": "x"})):  # the same rows
        pass


def test_settings_may_be_put_right_while_nothing_is_answered(shards: ModuleType, tmp_path: Path) -> None:
    output, source = tmp_path / "out", write(tmp_path / "a.jsonl", {"prompt": "x"})
    with claim(shards, output, source, max_tokens=-8):
        pass
    with claim(shards, output, source):
        assert json.loads((output / "job.json").read_text())["max_tokens"] == 8


def test_a_folder_with_results_of_nobody_is_refused(shards: ModuleType, tmp_path: Path) -> None:
    """Such as one that holds the input itself under the results' name."""
    source = write(tmp_path / "completions.jsonl", {"prompt": "x"})
    with pytest.raises(ValueError, match=r"has completions.jsonl but no job.json"):
        claim(shards, tmp_path, source).__enter__()
    assert source.read_text() == '{"prompt": "x"}\n'


def test_two_runs_do_not_share_a_folder(shards: ModuleType, tmp_path: Path) -> None:
    output, source = tmp_path / "out", write(tmp_path / "a.jsonl", {"prompt": "x"})
    with (
        claim(shards, output, source),
        pytest.raises(ValueError, match=r"another run is at work there"),
        claim(shards, output, source),
    ):
        pass


def shard(drafts: int, accepted: list[int], *rows: dict[str, Any]) -> dict[str, Any]:
    counts = {
        "drafts": drafts,
        "drafted_tokens": drafts * len(accepted),
        "accepted_tokens": sum(accepted),
        "accepted_per_position": accepted,
        "drafted_per_position": None,
    }
    return {"rows": list(rows), "acceptance": counts}


def test_joined_figures_are_pooled_and_of_rows(shards: ModuleType, tmp_path: Path) -> None:
    """Rows of acceptance length 3 (12 drafts, 24 accepted) and 1.5 (4, 2); one that failed, one never drafted for."""
    (tmp_path / "shards").mkdir()
    ok = {"output_tokens": 36, "acceptance_length": 3.0, "line": 1}
    write(tmp_path / "shards" / "a.json", shard(12, [12, 12], ok, {"line": 2, "error": "too long"}))
    short, single = {"output_tokens": 6, "acceptance_length": 1.5}, {"output_tokens": 1, "acceptance_length": None}
    write(tmp_path / "shards" / "b.json", shard(4, [2, 0], short | {"line": 3}, single | {"line": 4}))
    summary = shards.join(tmp_path, ["a.json", "b.json"])
    assert summary == json.loads((tmp_path / "summary.json").read_text()) | {"counters": summary["counters"]}
    assert (summary["rows"], summary["failed"], summary["output_tokens"]) == (4, 1, 43)
    assert summary["acceptance_length_pooled"] == 1 + 26 / 16
    assert summary["acceptance_length_mean_of_rows"] == 2.25
    assert summary["acceptance_rate"] == 26 / 32
    assert summary["counters"]["accepted_per_position"] == (14, 12)
    lines = (tmp_path / "completions.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in lines] == [1, 2, 3, 4]


def test_a_shard_that_is_not_whole_is_named(shards: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.json").write_text('{"rows": [')
    with pytest.raises(ValueError, match=r"shards/a.json: not a whole shard: .* Delete it and run again"):
        shards.join(tmp_path, ["a.json"])
    assert not (tmp_path / "completions.jsonl").exists()
