# SPDX-License-Identifier: Apache-2.0
"""Runs one vLLM engine and a list of generation runs in a process of its own, for the end-to-end tests.

    python engine_child.py JOB.json RESULT.json

The job: {"llm": LLM arguments, "plant_bias": added logit or 0, "alternates": [steps that draft, steps that do not] or
null, "runs": [{"name", "prompts": [[ids]], "max_tokens": of all or of each, "temperature", "concurrent": bool,
"arrivals": [the step before which each comes], "sampling": [more SamplingParams of each]}]}. The result: per run the
token ids, their log-probabilities where `sampling` asks for them, step by step how many tokens each request gained, and
in which step it began to; and vLLM's and the plugin's counters over the whole run.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    from vllm import LLM

    if job.get("plant_bias"):
        plant_bias(job["plant_bias"])
    if job.get("alternates"):
        alternate_drafting(*job["alternates"])
    llm = LLM(**{"skip_tokenizer_init": True, "enforce_eager": True, "disable_log_stats": False} | job["llm"])
    runs = {run["name"]: generate(llm, run) for run in job["runs"]}
    Path(result_file).write_text(json.dumps(runs))


def generate(llm: Any, run: dict[str, Any]) -> dict[str, Any]:
    before = counters(llm)
    groups = [run["prompts"]] if run.get("concurrent", True) else [[prompt] for prompt in run["prompts"]]
    parts = [drive(llm.llm_engine, group, run) for group in groups]
    after = counters(llm)
    counted = {name: after[name] - before.get(name, 0) for name in after}
    return {key: [of for part in parts for of in part[key]] for key in parts[0]} | {"counters": counted}


def drive(engine: Any, prompts: list[list[int]], run: dict[str, Any]) -> dict[str, list[Any]]:
    """All prompts through the engine, step by step; at once, unless the run says when they come."""
    names = [f"{run['name']}-{index}" for index in range(len(prompts))]
    arrivals = run.get("arrivals", [0] * len(prompts))
    coming = list(zip(arrivals, names, prompts, sampling_params(run, len(prompts)), strict=True))
    token_ids: dict[str, list[int]] = {name: [] for name in names}
    steps: dict[str, list[int]] = {name: [] for name in names}
    logprobs: dict[str, list[float]] = {name: [] for name in names}
    first_steps: dict[str, int] = {}
    number = 0
    while coming or engine.has_unfinished_requests():
        while coming and coming[0][0] <= number:
            _, name, prompt, params = coming.pop(0)
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        number += 1
        for output in engine.step():
            name, ids = output.request_id.split("|")[0], list(output.outputs[0].token_ids)
            first_steps.setdefault(name, number)
            steps[name].append(len(ids) - len(token_ids[name]))
            token_ids[name] = ids
            places = output.outputs[0].logprobs or []
            logprobs[name] = [of_place[token].logprob for token, of_place in zip(ids, places, strict=False)]
    found = {"token_ids": token_ids, "step_lengths": steps, "logprobs": logprobs, "first_steps": first_steps}
    return {key: [of_name[name] for name in names] for key, of_name in found.items()}


def sampling_params(run: dict[str, Any], number: int) -> list[Any]:
    """Of so many prompts that run together."""
    from vllm import SamplingParams

    lengths = run["max_tokens"] if isinstance(run["max_tokens"], list) else [run["max_tokens"]] * number
    more = run.get("sampling", [{}] * number)
    return [
        SamplingParams(
            max_tokens=lengths[index],
            ignore_eos=True,
            detokenize=False,
            **({"seed": run["seed"] + index} if "seed" in run else {}),
            **{"temperature": run.get("temperature", 0.0)} | more_sampling(more[index]),
        )
        for index in range(number)
    ]


def more_sampling(options: dict[str, Any]) -> dict[str, Any]:
    from vllm.sampling_params import StructuredOutputsParams

    options = dict(options)
    if "structured_outputs" in options:
        options["structured_outputs"] = StructuredOutputsParams(**options["structured_outputs"])
    return options


def counters(llm: Any) -> dict[str, float]:
    """vLLM's own by name, or `name[position]`; and ours, which `get_metrics` leaves out, also by `name[reason]`."""
    from prometheus_client import REGISTRY

    found = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    for metric in llm.get_metrics():
        for position, count in enumerate(getattr(metric, "values", [])):
            found[f"{metric.name}[{position}]"] = count
    for family in REGISTRY.collect():
        for sample in family.samples if family.name.startswith("vllm_dflash:") else []:
            label = sample.labels.get("position") or sample.labels.get("reason")
            found[sample.name.removesuffix("_total") + (f"[{label}]" if label else "")] = sample.value
    return found


def plant_bias(added_logit: float) -> None:
    """Make every verification favour its drafts a little: a fault that a test of the distribution must notice."""
    from vllm.v1.sample.rejection_sampler import RejectionSampler

    forward = RejectionSampler.forward

    def biased(self: Any, metadata: Any, draft_probs: Any, logits: Any, sampling_metadata: Any) -> Any:
        rows = metadata.target_logits_indices
        logits[rows.long(), metadata.draft_token_ids.long()] += added_logit
        return forward(self, metadata, draft_probs, logits, sampling_metadata)

    RejectionSampler.forward = biased


def alternate_drafting(num_with: int, num_without: int) -> None:
    """Let trees that follow the load be drafted for some decisions, for others not, and so on."""
    from vllm_dflash.compat.trees.budget import TreeBudget, _Settled

    decisions = itertools.count()
    _Settled.holds = lambda self, *batch: False
    TreeBudget._is_to_draft = lambda self, choice, probe_steps: next(decisions) % (num_with + num_without) < num_with


if __name__ == "__main__":
    main(*sys.argv[1:])
