# SPDX-License-Identifier: Apache-2.0
"""Bad input to a real `vllm serve`: a clear error, a non-zero exit code, no hang, nothing left running."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.engines import DRAFTER, TARGET, VLLM, environment

pytestmark = pytest.mark.engine

TIMEOUT_S = 240


@dataclass(frozen=True)
class Case:
    """What is wrong, and what the error must say."""

    name: str
    speculative: dict
    expected: tuple[str, ...]
    flags: tuple[str, ...] = ()


def edited_drafter(folder: Path, **changes) -> Path:
    """A copy of the shipped drafter with keys of its config.json changed."""
    shutil.copytree(DRAFTER, folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        if isinstance(value, dict):
            value = config[key] | value
        config[key] = value
    file.write_text(json.dumps(config))
    return folder


def cases(folder: Path) -> list[Case]:
    beyond = edited_drafter(folder / "beyond", dflash_config={"target_layer_ids": [1, 2, 40]})
    other = edited_drafter(folder / "other", target_hidden_size=4096)
    truncated = edited_drafter(folder / "truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    empty = folder / "empty"
    empty.mkdir()
    tree = json.dumps({"dflash": {"tree": 31}})
    return [
        Case("zero", {"model": str(DRAFTER), "num_speculative_tokens": 0}, ("num_speculative_tokens", "0")),
        Case("sixteen", {"model": str(DRAFTER), "num_speculative_tokens": 16}, ("num_speculative_tokens", "16", "15")),
        Case("beyond", {"model": str(beyond)}, ("target_layer_ids", "40", "0..7")),
        Case("other_width", {"model": str(other)}, ("target_hidden_size", "4096", "192")),
        Case("no_config", {"model": str(empty)}, ("config.json", str(empty))),
        Case("truncated", {"model": str(truncated)}, ("model.safetensors",)),
        Case("tree", {"model": str(DRAFTER)}, ("tree", "draft on a GPU"), ("--additional-config", tree)),
    ]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a server ended."""

    returncode: int
    output: str
    left_running: list[str]


def serve(case: Case) -> Outcome:
    """Start a server in a session of its own, so that whatever it leaves behind can be found."""
    speculative = json.dumps({"method": "dflash"} | case.speculative)
    process = subprocess.Popen(
        [VLLM, "serve", str(TARGET), "--speculative-config", speculative, *case.flags],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{case.name}: still running after {TIMEOUT_S} s")
    listing = subprocess.run(["ps", "-o", "args=", "-g", str(process.pid)], capture_output=True, text=True).stdout
    return Outcome(process.returncode, output, listing.splitlines())


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """All servers, two at a time: each spends its seconds importing."""
    listed = cases(tmp_path_factory.mktemp("drafters"))
    with ThreadPoolExecutor(max_workers=2) as pool:
        return {case.name: (case, outcome) for case, outcome in zip(listed, pool.map(serve, listed), strict=True)}


@pytest.mark.parametrize("name", ["zero", "sixteen", "beyond", "other_width", "no_config", "truncated", "tree"])
def test_clear_error_and_clean_exit(name, outcomes):
    case, outcome = outcomes[name]
    assert outcome.returncode != 0
    last_lines = "\n".join(outcome.output.splitlines()[-12:])
    for words in case.expected:
        assert words in last_lines, last_lines
    assert not outcome.left_running
