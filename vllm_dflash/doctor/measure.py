# SPDX-License-Identifier: Apache-2.0
"""Runs a pair on a few prompts with the Transformers backend, also with neighbouring target layers and both template
modes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_dflash.benchmark.job import Prompt
from vllm_dflash.benchmark.metrics import counts_of_rounds
from vllm_dflash.config import DFlashConfig
from vllm_dflash.doctor.facts import Facts
from vllm_dflash.doctor.measurement import DEFAULT, NO_THINKING, THINKING, Measurement, Run
from vllm_dflash.hf import DFlashDraftModel
from vllm_dflash.training.evaluate import acceptance_lengths

_SHIFTS = (0, -1, 1)


@dataclass(frozen=True)
class Way:
    """One way of running the prompts."""

    shift: int
    mode: str


def ways(layer_ids: Sequence[int], depth: int, has_switch: bool) -> Iterator[Way]:
    """As it is first, then the neighbouring layer ids that the target has, then the template's other mode."""
    mode = THINKING if has_switch else DEFAULT
    for shift in _SHIFTS:
        if layer_ids[0] + shift >= 0 and layer_ids[-1] + shift < depth:
            yield Way(shift, mode)
    if has_switch and layer_ids[-1] < depth:
        yield Way(0, NO_THINKING)


def measure(facts: Facts, prompts: Sequence[Prompt], max_new_tokens: int, show: Callable[[str], None]) -> Measurement:
    """Generate greedily for each prompt, in each way. `show` is told what goes on.

    Raises what torch, Transformers and jinja2 raise for models that cannot be loaded or run together.
    """
    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = _dtype(facts.asked.dtype, device)
    show(f"loading both models on {device}")
    target = AutoModelForCausalLM.from_pretrained(facts.target.source, dtype=dtype).eval().to(device)
    draft = DFlashDraftModel.from_pretrained(facts.drafter.source, dtype=target.dtype).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(facts.target.source)
    given, runs = draft.dflash, []
    depth = target.config.get_text_config(decoder=True).num_hidden_layers
    has_switch = facts.target.tokenizer is not None and facts.target.tokenizer.has_thinking_switch
    ends = list(facts.target.end_token_ids) or None
    for way in ways(given.target_layer_ids, depth, has_switch):
        draft.dflash = replace(given, target_layer_ids=tuple(i + way.shift for i in given.target_layer_ids))
        show(f"target layers {list(draft.dflash.target_layer_ids)}, mode {way.mode}")
        ids = [token_ids(tokenizer, prompt, way.mode) for prompt in prompts]
        lengths = [acceptance_lengths(draft, target, one, max_new_tokens, ends) for one in ids]
        runs.append(run_of(draft.dflash, way, lengths))
    seconds = time.perf_counter() - started
    name = str(target.dtype).removeprefix("torch.")
    return Measurement(tuple(runs), len(prompts), max_new_tokens, device, name, seconds)


def run_of(config: DFlashConfig, way: Way, lengths: Sequence[Sequence[int]]) -> Run:
    """Count. lengths: of each prompt, of each draft, how many tokens were accepted and the target's own."""
    drafts = [length for prompt in lengths for length in prompt]
    counts = counts_of_rounds(drafts, config.num_speculative_tokens)
    return Run(config.target_layer_ids, way.shift, way.mode, counts, tuple(len(prompt) for prompt in lengths))


def _dtype(asked: str, device: str) -> torch.dtype | str:
    """float32 on a CPU, where 16 bits are slow and less exact; else the checkpoint's own."""
    if asked == "auto":
        return "auto" if device == "cuda" else torch.float32
    return getattr(torch, asked)


def token_ids(tokenizer: Any, prompt: Prompt, mode: str) -> list[int]:
    """What the target reads: stored ids where no mode is asked for, else the text through its chat template."""
    if prompt.token_ids is not None and mode == DEFAULT:
        return list(prompt.token_ids)
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(prompt.text).input_ids)
    options = {} if mode == DEFAULT else {"enable_thinking": mode == THINKING}
    messages = [{"role": "user", "content": prompt.text}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    return list(tokenizer(text, add_special_tokens=False).input_ids)
