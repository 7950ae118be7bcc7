# SPDX-License-Identifier: Apache-2.0
"""Two GPUs, by vLLM's own processes and by Ray: the text of one GPU, from as many accepted drafts.

In bf16 two ranks add up in another order than one does, which decides near-ties.
"""

from __future__ import annotations

import pytest

from tests.e2e.engines import DRAFTER, dflash, with_idle_head
from tests.e2e.on_gpu import NUM_PROMPTS, assert_same_text, generate

pytestmark = [pytest.mark.engine, pytest.mark.gpu]


@pytest.fixture(scope="module", autouse=True)
def two_gpus():
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, found {torch.cuda.device_count()}")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("one"), **dflash())


def assert_as_one(got, one):
    assert_same_text(got, one, most=NUM_PROMPTS // 4)
    assert got.acceptance_length == pytest.approx(one.acceptance_length, rel=0.1)
    assert got.acceptance_length > 4


@pytest.mark.parametrize("backend", ["mp", "ray"])
def test_two_are_one(backend, one, tmp_path):
    two = generate(tmp_path, **dflash(), tensor_parallel_size=2, distributed_executor_backend=backend)
    assert_as_one(two, one)


@pytest.mark.parametrize("backend", ["mp", "ray"])
def test_trees(backend, one, tmp_path):
    trees = {"additional_config": {"dflash": {"tree": 31}}, "distributed_executor_backend": backend}
    treed = generate(tmp_path, **dflash(), tensor_parallel_size=2, **trees)
    assert_same_text(treed, one, most=NUM_PROMPTS // 4)
    assert treed.acceptance_length > 1.1 * one.acceptance_length


def test_whole_drafter_on_every_rank(one, tmp_path):
    """Of a drafter that two ranks could not share out."""
    drafter = with_idle_head(DRAFTER, tmp_path / "drafter")
    assert_as_one(generate(tmp_path, tensor_parallel_size=2, **dflash(drafter, draft_tensor_parallel_size=1)), one)
