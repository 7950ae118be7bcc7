# SPDX-License-Identifier: Apache-2.0
"""One batch of requests: run it to its end, and find the steps in which all of them were running."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from gpu.names import Record

SKIPPED_STEPS = 3  # at the start of the steady region, where the pipeline fills
PROFILED_STEPS = 20

Step = tuple[float, int, bool, bool]  # when its output came, tokens, have all requests had output, has any ended


def exactly(max_tokens: int, temperature: float) -> Any:
    """Sampling parameters of a request for so many tokens, told as they come."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=temperature,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def run_batch(
    llm: Any,
    prompts: list[list[int]],
    max_tokens: int,
    temperature: float = 0.0,
    steady_step: Callable[[], None] | None = None,
) -> tuple[list[Step], list[list[int]]]:
    """Step the engine until all requests are done: (steps that had output, token ids by request).

    `steady_step` is called after every step from where all of them have had output.
    """
    engine, sampling = llm.llm_engine, exactly(max_tokens, temperature)
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling)
    token_ids: list[list[int]] = [[] for _ in prompts]
    steps: list[Step] = []
    waiting = len(prompts)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now, tokens, ended = time.perf_counter(), 0, False
        for output in outputs:
            ids, own = output.outputs[0].token_ids, token_ids[int(output.request_id)]
            waiting -= not own and bool(ids)
            own += ids
            tokens += len(ids)
            ended |= output.finished
        if tokens:
            steps.append((now, tokens, not waiting, ended))
            if steady_step is not None and not waiting:
                steady_step()
    return steps, token_ids


def steady_region(steps: Sequence[Step], requests: int) -> Record:
    """Time and tokens of the steps where all requests run. `steady` is False where there were too few of them."""
    full = [step for step in steps if step[2]]
    until = next(index for index, step in enumerate(full) if step[3])
    region = full[min(SKIPPED_STEPS, until // 4) : until]
    steady = len(region) >= 4
    region = region if steady else list(steps[-max(2, len(full)) :])
    gaps = [1000 * (after[0] - before[0]) for before, after in zip(region, region[1:], strict=False)] or [float("nan")]
    tokens = sum(step[1] for step in region[1:])
    seconds = region[-1][0] - region[0][0]
    return {
        "ms_step": statistics.mean(gaps),
        "ms_step_median": statistics.median(gaps),
        "steps": len(gaps),
        "tokens_s": tokens / seconds if seconds else float("nan"),
        "length": tokens / len(gaps) / requests,
        "steady": steady,
    }
