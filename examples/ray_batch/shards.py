# SPDX-License-Identifier: Apache-2.0
"""The rows of a batch job on disk: the input, one file for each answered shard, and the results joined from them.

A shard's file is named by its rows, and is there whole or not at all. So each row is in the results once, however
often a job is killed and a shard computed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from vllm_dflash.benchmark.metrics import AcceptanceCounts
from vllm_dflash.benchmark.sets.jsonl import conversation_of
from vllm_dflash.files import numbered_lines, write_whole
from vllm_dflash.training.origin import check_origin, write_origin

JOB, SHARDS, COMPLETIONS, SUMMARY = "job.json", "shards", "completions.jsonl", "summary.json"
#: Of AcceptanceCounts: a tuple, of which JSON makes a list.
POSITIONS = "accepted_per_position"

Row = dict[str, Any]


def read_rows(file: Path) -> list[Row]:
    """Of all lines: number from 1, id, messages. Raises ValueError naming the file and the line that is wrong."""
    rows = []
    for number, text in numbered_lines(file):
        conversation = conversation_of(text, f"{file}:{number}", str(number))
        if len(conversation.turns) != 1:
            raise ValueError(f"{file}:{number}: {len(conversation.turns)} turns: one prompt a line is needed")
        messages = [*conversation.history, {"role": "user", "content": conversation.turns[0]}]
        rows.append({"line": number, "id": json.loads(text).get("id", number), "messages": messages})
    if not rows:
        raise ValueError(f"{file}: holds no prompt")
    return rows


def cut(rows: list[Row], size: int) -> dict[str, list[Row]]:
    """Shards by the names of their files: first and last row, counted from 0."""
    parts = [(start, rows[start : start + size]) for start in range(0, len(rows), size)]
    return {f"{start:09d}-{start + len(part) - 1:09d}.json": part for start, part in parts}


@contextlib.contextmanager
def claimed(output: Path, rows: list[Row], settings: Mapping[str, Any]) -> Iterator[None]:
    """The folder is this job's, and no other run is at work there. `settings`: what the answers depend on, JSON-ready.

    Raises ValueError naming the folder if it holds answers to another input or of other settings.
    """
    output.mkdir(parents=True, exist_ok=True)
    job = {"rows_sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(), **settings}
    with (output / ".lock").open("w") as lock:  # the system gives it back, however this process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--output {output}: another run is at work there") from None
        if results := [name for name in (SHARDS, COMPLETIONS, SUMMARY) if (output / name).exists()]:
            if not (output / JOB).is_file():
                raise ValueError(f"--output {output}: has {results[0]} but no {JOB}. Choose another --output")
            check_origin(output / JOB, job, "Choose another --output")
        write_origin(output / JOB, job)
        for half in (output / SHARDS).glob("*.partial"):  # of a run that was killed
            half.unlink()
        yield


def missing(output: Path, shards: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """Those that have no file yet."""
    return {name: rows for name, rows in shards.items() if not (output / SHARDS / name).is_file()}


def join(output: Path, names: list[str]) -> dict[str, Any]:
    """Write all rows, in the order of the shards' names given, and what they amount to, which is returned."""
    rows: list[Row] = []
    counts: list[AcceptanceCounts] = []
    for file in (output / SHARDS / name for name in names):
        try:
            shard = json.loads(file.read_text(encoding="utf-8"))
            rows += shard["rows"]
            counted = shard["acceptance"]
            counts.append(AcceptanceCounts(**counted | {POSITIONS: tuple(counted[POSITIONS])}))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: not a whole shard: {error!r}. Delete it and run again") from error
    pooled = reduce(add, counts)
    lengths = [row["acceptance_length"] for row in rows if row.get("acceptance_length") is not None]
    summary = {
        "rows": len(rows),
        "failed": sum("error" in row for row in rows),
        "output_tokens": sum(row.get("output_tokens", 0) for row in rows),
        "acceptance_length_pooled": pooled.acceptance_length,
        "acceptance_length_mean_of_rows": sum(lengths) / len(lengths) if lengths else None,
        "acceptance_rate": pooled.acceptance_rate,
        "counters": asdict(pooled),
    }
    write_whole(output / COMPLETIONS, "".join(json.dumps(row) + "\n" for row in rows))
    write_whole(output / SUMMARY, json.dumps(summary, indent=1) + "\n")
    return summary
