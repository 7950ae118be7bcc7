# SPDX-License-Identifier: Apache-2.0
"""The child that answers training prompts with vLLM: `python -m vllm_dflash.training.vllm_responses FD`.

It sends the responses of a chunk as soon as all of them are there, and None at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm_dflash.benchmark.offline import serve_job
from vllm_dflash.training.responding import Asked, ResponseJob
from vllm_dflash.training.responses import Response

if TYPE_CHECKING:
    from vllm import SamplingParams


def run_job(job: ResponseJob) -> Iterator[dict[str, Response] | None]:
    """Start the engine and answer, longest prompts first: what does not fit shows at once."""
    from vllm import LLM

    share = job.gpu_memory_utilization
    memory = {} if share is None else {"gpu_memory_utilization": share}
    llm = LLM(model=job.target, dtype=job.dtype, max_model_len=job.max_model_len, **memory)
    asked = sorted(job.asked, key=lambda each: -len(each.prompt_token_ids))
    for start in range(0, len(asked), job.chunk):
        chunk = asked[start : start + job.chunk]
        prompts = [{"prompt_token_ids": list(each.prompt_token_ids)} for each in chunk]
        outputs = llm.generate(prompts, [sampling(each, job.end_ids) for each in chunk], use_tqdm=False)
        yield {
            each.id: Response(list(each.prompt_token_ids), list(output.outputs[0].token_ids), each.temperature)
            for each, output in zip(chunk, outputs, strict=True)
        }
    yield None


def sampling(asked: Asked, end_ids: tuple[int, ...]) -> SamplingParams:
    """End tokens stay in the response: the drafter is to foresee them too."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=asked.temperature,
        seed=asked.seed,
        max_tokens=asked.max_tokens,
        stop_token_ids=list(end_ids),
        detokenize=False,
    )


if __name__ == "__main__":
    serve_job(run_job)
