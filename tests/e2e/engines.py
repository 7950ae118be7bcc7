# SPDX-License-Identifier: Apache-2.0
"""Starting engine processes for the end-to-end tests, and the shipped pair they run on."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAIR = ROOT / "models" / "tiny-python"
TARGET, DRAFTER = PAIR / "target", PAIR / "drafter"
CHILD = Path(__file__).with_name("engine_child.py")
#: What chooses the runner. On a CPU, V2 runs in Triton's interpreter, which torch.compile cannot look into.
RUNNERS = {
    "V1": {"VLLM_USE_V2_MODEL_RUNNER": "0"},
    "V2": {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "PYTHONPATH": str(ROOT / "tests" / "interpreter_site"),
        "TORCHDYNAMO_DISABLE": "1",
    },
    "V2 on a GPU": {"VLLM_USE_V2_MODEL_RUNNER": "1"},
}
#: The command a user types.
VLLM = str(Path(sys.executable).with_name("vllm"))
#: An engine start takes 15-40 s on two cores; a hang must end long before the whole suite's limit.
TIMEOUT_S = 420


@dataclass(frozen=True)
class Run:
    """One generation run: what each prompt got, by step, and vLLM's counters over it."""

    token_ids: list[list[int]]
    step_lengths: list[list[int]]
    counters: dict[str, float]
    logprobs: list[list[float]]  # of a request that asked for them
    first_steps: list[int]  # in which each request's first token came, counted from 1

    @property
    def acceptance_length(self) -> float:
        """Pooled: 1 + accepted / drafts, bonus token included."""
        drafts = self.counters["vllm:spec_decode_num_drafts"]
        return 1 + self.counters["vllm:spec_decode_num_accepted_tokens"] / drafts


def environment(**extra: str) -> dict[str, str]:
    """What a CPU engine needs; one thread, so that results do not depend on the machine's cores."""
    return os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **extra,
    }


def run_engine(
    folder: Path,
    llm: dict[str, Any],
    runs: list[dict[str, Any]],
    plant_bias: float = 0.0,
    runner: str = "V1",
    alternates: tuple[int, int] | None = None,
    **env: str,
) -> dict[str, Run]:
    """Run one engine through `runs` in a process of its own; raises with the end of its log if it fails.

    `runner` is one of RUNNERS. `alternates`: so many steps draft trees, then so many do not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job, result, log = folder / "job.json", folder / "result.json", folder / "engine.log"
    job.write_text(json.dumps({"llm": llm, "runs": runs, "plant_bias": plant_bias, "alternates": alternates}))
    # Engine core and worker in the child's own process: no start-up of two more interpreters.
    parallel = llm.get("tensor_parallel_size", 1) * llm.get("pipeline_parallel_size", 1) > 1
    one_process = {} if parallel else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with log.open("w") as stream:
        done = subprocess.run(
            [sys.executable, str(CHILD), str(job), str(result)],
            env=environment(**RUNNERS[runner], **one_process, **env),
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
        )
    if done.returncode != 0:
        raise RuntimeError(
            f"engine failed ({done.returncode}), {log}:\n" + "\n".join(log.read_text().splitlines()[-40:])
        )
    return {name: Run(**fields) for name, fields in json.loads(result.read_text()).items()}


def run_data_parallel(
    folder: Path, llm: dict[str, Any], runs_by_rank: list[list[dict[str, Any]]], runner: str
) -> dict[str, Run]:
    """Run one engine a data-parallel rank, all at once, each through its own runs: those of all ranks together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"VLLM_DP_SIZE": str(len(runs_by_rank)), "VLLM_DP_MASTER_PORT": str(port)}

    def run_rank(rank: int) -> dict[str, Run]:
        env = group | {"VLLM_DP_RANK": str(rank)}
        return run_engine(folder / f"rank{rank}", llm, runs_by_rank[rank], runner=runner, **env)

    with ThreadPoolExecutor() as ranks:
        results = list(ranks.map(run_rank, range(len(runs_by_rank))))
    return {name: run for runs in results for name, run in runs.items()}


def held_out_prompts(count: int) -> list[list[int]]:
    """Token ids of the first `count` held-out prompts of the shipped pair."""
    lines = (PAIR / "heldout.jsonl").read_text().splitlines()[:count]
    return [json.loads(line)["prompt_token_ids"] for line in lines]


def dflash(model: Path = DRAFTER, **extra: Any) -> dict[str, Any]:
    """The speculative config of the tests: only method and model, K by default."""
    return {"speculative_config": {"method": "dflash", "model": str(model), **extra}}


def with_idle_head(drafter: Path, folder: Path) -> Path:
    """A copy of a drafter with one more key/value head and its query heads, of which the output takes nothing."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(drafter, folder)
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    num_kv_heads, num_heads, width = (config[k] for k in ("num_key_value_heads", "num_attention_heads", "head_dim"))
    group = num_heads // num_kv_heads
    for name, weight in weights.items():
        if name.endswith("o_proj.weight"):
            weights[name] = torch.cat([weight, weight.new_zeros(len(weight), group * width)], dim=1)
        for part, num_new in (("q_proj", group), ("k_proj", 1), ("v_proj", 1)):
            if name.endswith(f"{part}.weight"):
                weights[name] = torch.cat([weight, weight[: num_new * width]])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config |= {"num_key_value_heads": num_kv_heads + 1, "num_attention_heads": num_heads + group}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
