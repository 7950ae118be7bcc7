# SPDX-License-Identifier: Apache-2.0
"""The target answers the prompts, in vLLM or in Transformers, and what it says is kept as it comes.

Which response is sampled and how follows from the seed and its prompt's id, so that a run that was killed ends with the
same mix.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from vllm_dflash.benchmark.engine_process import EngineFailedError, engine_child, receive
from vllm_dflash.training.recipe import DataRecipe
from vllm_dflash.training.response_store import ResponseStore
from vllm_dflash.training.responses import Response, until_end

logger = logging.getLogger(__name__)
_TRANSFORMERS_BATCH, _VLLM_CHUNK = 64, 1024
_CHILD = (sys.executable, "-m", "vllm_dflash.training.vllm_responses")


@dataclass(frozen=True)
class Asked:
    """One prompt and how it is to be answered. Temperature 0 is greedy."""

    id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class ResponseJob:
    """What the vLLM child gets. Prompts are answered `chunk` at a time."""

    target: str
    asked: tuple[Asked, ...]
    end_ids: tuple[int, ...]
    max_model_len: int
    dtype: str
    gpu_memory_utilization: float | None = None  # None: vLLM's default
    chunk: int = _VLLM_CHUNK


def ask(prompts: Mapping[str, Sequence[int]], data: DataRecipe) -> list[Asked]:
    """The recipe's mix of greedy and sampled responses. A prompt that leaves no room for one is left out."""
    asked, num_long = [], 0
    for prompt_id, ids in prompts.items():
        rng = random.Random(f"{data.seed}:{prompt_id}")
        sampled = rng.random() < data.sampled_share
        temperature = rng.choice(_rising(*data.temperatures)) if sampled else 0.0
        room = data.max_length - len(ids)
        if ids and room > 1:
            most = min(data.max_new_tokens, room)
            asked.append(Asked(prompt_id, tuple(ids), most, temperature, rng.randrange(2**31)))
        else:
            num_long += 1
    if num_long:
        logger.warning("%d prompts leave no room for a response within data.max_length = %d", num_long, data.max_length)
    if not asked:
        raise ValueError(f"none of {len(prompts)} prompts leaves room for a response: raise data.max_length")
    return asked


def _rising(low: float, high: float) -> list[float]:
    """Few different ones, so that many prompts share one and decode together."""
    return [round(low + (high - low) * part / 3, 3) for part in range(4)]


def uses_vllm(data: DataRecipe) -> bool:
    """Whether vLLM answers. Raises ValueError where the recipe wants it and it is not installed."""
    is_there = importlib.util.find_spec("vllm") is not None
    if data.engine == "vllm" and not is_there:
        raise ValueError("data.engine: vllm is not installed: pip install 'vllm-dflash[cuda]', or say transformers")
    return data.engine == "vllm" or (data.engine == "auto" and is_there and torch.cuda.is_available())


def respond_with_vllm(store: ResponseStore, job: ResponseJob, log: Path) -> None:
    """Answer all that is asked in a child, whose memory is free again afterwards.

    Raises ValueError naming its log if vLLM fails; what has been answered by then is kept.
    """
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"} | dict(os.environ)
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with engine_child(_CHILD, job, environment, log) as (child, connection):
            while (written := receive(child, connection, log)) is not None:
                store.add(written)
                logger.info("responses: %d", len(store.responses))
    except EngineFailedError as error:
        raise ValueError(f"{error} while it wrote responses; its log: {log}. Run the command again to go on") from error


def respond_with_transformers(store: ResponseStore, target: Any, asked: Sequence[Asked], end_ids: list[int]) -> None:
    """The same on Transformers: prompts of about one length together, padded on the left."""
    for batch in _alike(asked):
        texts = generated(target, batch, end_ids)
        store.add(
            {
                each.id: Response(list(each.prompt_token_ids), text, each.temperature)
                for each, text in zip(batch, texts, strict=True)
            }
        )
        logger.info("responses: %d", len(store.responses))


def generated(target: Any, batch: Sequence[Asked], end_ids: list[int]) -> list[list[int]]:
    """Responses of prompts with one temperature; each ends after its first end token (kept) or at its own length."""
    longest = max(len(each.prompt_token_ids) for each in batch)
    input_ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, each in enumerate(batch):
        input_ids[row, longest - len(each.prompt_token_ids) :] = torch.tensor(each.prompt_token_ids)
        mask[row, longest - len(each.prompt_token_ids) :] = 1
    temperature = batch[0].temperature
    config = GenerationConfig(
        max_new_tokens=max(each.max_tokens for each in batch),
        eos_token_id=end_ids or None,
        pad_token_id=end_ids[0] if end_ids else 0,
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
    )
    torch.manual_seed(batch[0].seed)
    with _neutral(target):
        outputs = target.generate(
            input_ids.to(target.device), attention_mask=mask.to(target.device), generation_config=config
        )
    rows = outputs[:, longest:].tolist()
    return [until_end(row, end_ids)[: each.max_tokens] for row, each in zip(rows, batch, strict=True)]


@contextlib.contextmanager
def _neutral(target: Any) -> Iterator[None]:
    """Without the target's own defaults (penalties, say), which Transformers would add to any settings."""
    own, target.generation_config = target.generation_config, GenerationConfig()
    try:
        yield
    finally:
        target.generation_config = own


def _alike(asked: Sequence[Asked]) -> Iterator[list[Asked]]:
    """Batches of one temperature, of prompts of about one length."""
    ordered = sorted(asked, key=lambda each: (each.temperature, -len(each.prompt_token_ids), each.id))
    for _, same in itertools.groupby(ordered, key=lambda each: each.temperature):
        while batch := list(itertools.islice(same, _TRANSFORMERS_BATCH)):
            yield batch
