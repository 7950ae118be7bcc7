# SPDX-License-Identifier: Apache-2.0
"""Runs one request through a vLLM engine with a drafter and saves what the draft model saw and computed, step by step.

python capture_child.py TARGET DRAFTER OUT.pt
"""

from __future__ import annotations

import sys
from typing import Any

import torch

PROMPT = [(7 * i * i + 3 * i) % 500 for i in range(45)]
NUM_STEPS = 6


def main(target: str, drafter: str, out: str) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        target, speculative_config={"method": "dflash", "model": drafter}, dtype="float32", max_model_len=256,
        skip_tokenizer_init=True, enforce_eager=True, block_size=32, enable_prefix_caching=False,
    )  # fmt: skip
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    steps: list[dict[str, Any]] = []
    watch(runner.drafter, steps)
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, detokenize=False)
    output = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)[0]
    torch.save({"steps": steps[:NUM_STEPS], "token_ids": output.outputs[0].token_ids}, out)


def watch(adapter: Any, steps: list[dict[str, Any]]) -> None:
    """Record every call of the proposer, and the draft layers' outputs in it."""
    proposer, model = adapter.proposer, adapter.model
    layers: list[torch.Tensor] = []

    def after_layer(module: Any, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        layers.append((output[0] + output[1]).clone())  # the residual stream

    def after_norm(module: Any, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        layers.append(output[0].clone())

    for layer in model.backbone.layers:
        layer.register_forward_hook(after_layer)
    model.backbone.norm.register_forward_hook(after_norm)
    propose = proposer.propose

    def recorded(step: Any, *args: Any, **kwargs: Any) -> Any:
        layers.clear()
        drafts = propose(step, *args, **kwargs)
        rejected = 0 if step.num_rejected is None else int(step.num_rejected[0])
        rows = step.features.shape[0] - rejected
        steps.append(
            {
                "features": step.features[:rows].clone(),
                "positions": step.positions[:rows].clone(),
                "anchor": int(step.anchors[0]),
                "layers": list(layers),
                "drafts": drafts.token_ids[0].tolist(),
            }
        )
        return drafts

    proposer.propose = recorded


if __name__ == "__main__":
    main(*sys.argv[1:])
