# SPDX-License-Identifier: Apache-2.0
"""Published prompt sets: where each lies on the Hugging Face hub and how a row becomes a conversation.

The table pins a commit of each, but for mt-bench. A branch or tag ("main", `--dataset-revision NAME=TAG`) is resolved
to the commit it stands for when a set is fetched first. The commit is kept in the cached file and told in the results,
and the cached file is what later runs read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dflash.benchmark.sets.conversations import PromptSet
from vllm_dflash.benchmark.sets.jsonl import conversation_of
from vllm_dflash.files import write_whole

Row = Mapping[str, Any]
BOXED = "Reason step by step, and give the final answer within \\boxed{}."


def _plain(field: str) -> Callable[[Row], list[str]]:
    return lambda row: [row[field]]


def _maths(field: str) -> Callable[[Row], list[str]]:
    return lambda row: [f"{row[field]}\n\n{BOXED}"]


def _complete_function(row: Row) -> list[str]:
    return [f"Complete this Python function so that it does what its docstring says.\n\n```python\n{row['prompt']}```"]


def _contest_problem(row: Row) -> list[str]:
    start = f"\n\nStart from this code:\n\n```python\n{row['starter_code']}\n```" if row.get("starter_code") else ""
    return [f"Solve this problem in Python.\n\n{row['question_content']}{start}"]


def _repository_issue(row: Row) -> list[str]:
    return [f"This issue was reported for {row['repo']}. Write a patch that resolves it.\n\n{row['problem_statement']}"]


def _instruction(row: Row) -> list[str]:
    return [f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]]


@dataclass(frozen=True)
class HubSet:
    """turns: of a row, what the user says. files: JSONL files of a repository that `datasets` has no config for."""

    repository: str
    split: str
    turns: Callable[[Row], list[str]]
    config: str | None = None
    files: tuple[str, ...] = ()
    revision: str = "main"


HUB_SETS: dict[str, HubSet] = {
    "gsm8k": HubSet(
        "openai/gsm8k", "test", _maths("question"), config="main", revision="e53f048856ff4f594e959d75785d2c2d37b678ee"
    ),
    "math500": HubSet(
        "HuggingFaceH4/MATH-500", "test", _maths("problem"), revision="ff5b20257d8185524591543f8ff5993951537bb8"
    ),
    "aime24": HubSet(
        "HuggingFaceH4/aime_2024", "train", _maths("problem"), revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a"
    ),
    "aime25": HubSet(
        "MathArena/aime_2025", "train", _maths("problem"), revision="c94da77eb22bbd6439e62a323bec18493a421302"
    ),
    "humaneval": HubSet(
        "openai/openai_humaneval", "test", _complete_function, revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544"
    ),
    "mbpp": HubSet(
        "google-research-datasets/mbpp",
        "test",
        _plain("prompt"),
        config="sanitized",
        revision="4bb6404fdc6cacfda99d4ac4205087b89d32030c",
    ),
    "livecodebench": HubSet(
        "livecodebench/code_generation_lite",
        "train",
        _contest_problem,
        files=("test.jsonl", "test2.jsonl"),
        revision="0fe84c3912ea0c4d4a78037083943e8f0c4dd505",
    ),
    "swe-bench": HubSet(
        "princeton-nlp/SWE-bench_Lite", "test", _repository_issue, revision="6ec7bb89b9342f664a54a6e0a6ea6501d3437cc2"
    ),
    "mt-bench": HubSet("HuggingFaceH4/mt_bench_prompts", "train", lambda row: list(row["prompt"]), revision="main"),
    "alpaca": HubSet("tatsu-lab/alpaca", "train", _instruction, revision="dce01c9b08f87459cf36a430d809084718273017"),
}


def load_hub_set(name: str, revision: str | None, cache: Path) -> PromptSet:
    """From the cache, or from the hub and then kept. Raises ValueError naming the set and what to do without a hub."""
    hub_set = HUB_SETS[name]
    wanted = revision or hub_set.revision
    cached = cache / f"{name}@{wanted.replace('/', '_')}.jsonl"
    if not cached.is_file():
        write_whole(cached, _fetch(name, hub_set, wanted))
    return read_cached(name, cached)


def read_cached(name: str, path: Path) -> PromptSet:
    """A cached file: its first line tells where the rest is from. Raises ValueError naming the file, and the line."""
    try:
        first, *lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        origin = json.loads(first)
        repository, commit = str(origin["repository"]), str(origin["commit"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: the cached prompts of --dataset {name} cannot be read ({type(error).__name__}: {error}); without "
            "the file they are fetched again"
        ) from error
    conversations = (conversation_of(line, f"{path}:{i}", f"{name}:{i}") for i, line in enumerate(lines, start=2))
    return PromptSet(name, tuple(conversations), repository, commit)


def cache_directory() -> Path:
    """VLLM_DFLASH_CACHE, or vllm_dflash in the user's cache directory."""
    if own := os.environ.get("VLLM_DFLASH_CACHE"):
        return Path(own) / "datasets"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm_dflash" / "datasets"


def _fetch(name: str, hub_set: HubSet, revision: str) -> str:
    """The cached file's text."""
    try:
        import datasets
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ValueError(f"--dataset {name}: needs the package datasets: pip install 'vllm-dflash[bench]'") from error
    where = f"--dataset {name}: {hub_set.repository} at revision {revision}"
    try:
        commit = HfApi().dataset_info(hub_set.repository, revision=revision).sha
        if hub_set.files:
            files = [f"hf://datasets/{hub_set.repository}@{commit}/{file}" for file in hub_set.files]
            rows = datasets.load_dataset("json", data_files=files, split=hub_set.split)
        else:
            rows = datasets.load_dataset(hub_set.repository, hub_set.config, revision=commit, split=hub_set.split)
    except Exception as error:  # the hub's client, httpx, datasets and the file system each raise errors of their own
        reason = next(iter(str(error).splitlines()), "no message")[:160]
        raise ValueError(
            f"{where} could not be read from the hub ({type(error).__name__}: {reason}). "
            "Without a hub: --dataset mini, which comes with this package, or --dataset FILE.jsonl"
        ) from error
    return cached_text(name, hub_set, commit or revision, rows, where)


def cached_text(name: str, hub_set: HubSet, commit: str, rows: Iterable[Row], where: str) -> str:
    """JSON lines: the origin, then every row's conversation. Raises ValueError naming the key a row does not have."""
    lines = [json.dumps({"repository": hub_set.repository, "commit": commit})]
    for number, row in enumerate(rows):
        try:
            turns = hub_set.turns(row)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where}: row {number} has no {error}; its keys: {', '.join(row)}") from error
        lines.append(json.dumps({"id": f"{name}:{number}", "turns": turns}, ensure_ascii=False))
    return "\n".join(lines) + "\n"
