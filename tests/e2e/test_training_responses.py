# SPDX-License-Identifier: Apache-2.0
"""Training responses by vLLM, in fp32, against those of Transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.engines import TARGET, held_out_prompts
from vllm_dflash.training.responding import Asked, ResponseJob, respond_with_vllm
from vllm_dflash.training.response_store import ResponseStore

pytestmark = pytest.mark.engine


def test_greedy_responses_are_the_target_s(tmp_path: Path) -> None:
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    ends = target.generation_config.eos_token_id
    prompts = held_out_prompts(4)
    asked = [Asked(f"p{i}", tuple(ids), 24 + i, 0.0, i) for i, ids in enumerate(prompts)]
    sampled = [Asked(f"s{i}", tuple(prompts[0]), 24, 1.0, i) for i in range(4)]
    store = ResponseStore(tmp_path, {})
    job = ResponseJob(str(TARGET), (*asked, *sampled), tuple(ends), 512, "float32", chunk=3)
    respond_with_vllm(store, job, tmp_path / "vllm.log")
    for each in asked:
        alone = target.generate(
            torch.tensor([each.prompt_token_ids]), max_new_tokens=each.max_tokens, do_sample=False, eos_token_id=ends
        )
        assert store.responses[each.id].token_ids == alone[0, len(each.prompt_token_ids) :].tolist()
    texts = {tuple(store.responses[each.id].token_ids) for each in sampled}
    assert len(texts) > 1, "seeds differ"


def test_a_failing_engine_is_told(tmp_path: Path) -> None:
    job = ResponseJob(str(tmp_path / "nowhere"), (), (), 512, "float32")
    with pytest.raises(ValueError, match=r"its log: .*vllm.log. Run the command again"):
        respond_with_vllm(ResponseStore(tmp_path, {}), job, tmp_path / "vllm.log")
