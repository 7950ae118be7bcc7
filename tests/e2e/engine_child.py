# SPDX-License-Identifier: Apache-2.0
"""Runs one vLLM engine and a list of generation runs in a process of its own, for the end-to-end tests.

    python engine_child.py JOB.json RESULT.json

The job: {"llm": LLM arguments, "plant_bias": added logit or 0, "runs": [{"name", "prompts": [[ids]], "max_tokens": of
all or of each, "temperature", "concurrent": bool, "sampling": [more SamplingParams of each]}]}. The result: per run the
token ids, their log-probabilities where `sampling` asks for them, and step by step how many tokens each request gained;
and vLLM's and the plugin's counters over the whole run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    from vllm import LLM

    if job.get("plant_bias"):
        plant_bias(job["plant_bias"])
    llm = LLM(**{"skip_tokenizer_init": True, "enforce_eager": True, "disable_log_stats": False} | job["llm"])
    runs = {run["name"]: generate(llm, run) for run in job["runs"]}
    Path(result_file).write_text(json.dumps(runs))


def generate(llm: Any, run: dict[str, Any]) -> dict[str, Any]:
    before = counters(llm)
    groups = [run["prompts"]] if run.get("concurrent", True) else [[prompt] for prompt in run["prompts"]]
    token_ids: list[list[int]] = []
    step_lengths: list[list[int]] = []
    logprobs: list[list[float]] = []
    for group in groups:
        ids, steps, probs = drive(llm.llm_engine, group, run)
        token_ids += ids
        logprobs += probs
        step_lengths += steps
    after = counters(llm)
    counted = {name: after[name] - before.get(name, 0) for name in after}
    return {"token_ids": token_ids, "step_lengths": step_lengths, "counters": counted, "logprobs": logprobs}


def drive(
    engine: Any, prompts: list[list[int]], run: dict[str, Any]
) -> tuple[list[list[int]], list[list[int]], list[list[float]]]:
    """All prompts at once through the engine, step by step."""
    from vllm import SamplingParams

    names = [f"{run['name']}-{index}" for index in range(len(prompts))]
    lengths = run["max_tokens"] if isinstance(run["max_tokens"], list) else [run["max_tokens"]] * len(prompts)
    sampling = run.get("sampling", [{}] * len(prompts))
    for index, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        params = SamplingParams(
            temperature=run.get("temperature", 0.0),
            max_tokens=lengths[index],
            ignore_eos=True,
            detokenize=False,
            **({"seed": run["seed"] + index} if "seed" in run else {}),
            **more_sampling(sampling[index]),
        )
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    token_ids: dict[str, list[int]] = {name: [] for name in names}
    steps: dict[str, list[int]] = {name: [] for name in names}
    logprobs: dict[str, list[float]] = {name: [] for name in names}
    while engine.has_unfinished_requests():
        for output in engine.step():
            name, ids = output.request_id.split("|")[0], list(output.outputs[0].token_ids)
            steps[name].append(len(ids) - len(token_ids[name]))
            token_ids[name] = ids
            found = output.outputs[0].logprobs or []
            logprobs[name] = [of_place[token].logprob for token, of_place in zip(ids, found, strict=False)]
    return [token_ids[name] for name in names], [steps[name] for name in names], [logprobs[name] for name in names]


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


if __name__ == "__main__":
    main(*sys.argv[1:])
