# SPDX-License-Identifier: Apache-2.0
"""Draft trees inside vLLM, part by part. The kernels are tested in tests/kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")
import torch
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_dflash.compat.ownership import TreeShape
from vllm_dflash.compat.trees.attention import use_tree_attention
from vllm_dflash.compat.trees.attention_cpu import visible_slots
from vllm_dflash.compat.trees.model_state import TreeModelState, depends_on_path
from vllm_dflash.compat.trees.sampler import TreeSampler
from vllm_dflash.compat.trees.store import TreeStep, TreeStore, verifying

CPU = torch.device("cpu")
SHAPE = TreeShape(num_nodes=5, num_depths=3, num_choices=5)


def store(rows: int = 4, kept_at: int = 2) -> TreeStore:
    trees = TreeStore(rows, 32, SHAPE, CPU)
    trees.trees.is_node[kept_at:] = True
    return trees


# What is kept from step to step.


def test_a_row_taken_over_holds_no_tree() -> None:
    trees = store(kept_at=1)
    for table in (trees.trees.depths, trees.trees.probs, trees.seen.num_said):
        table.fill_(7)
    trees.begin(2, as_chain=False)
    trees.begin(2, as_chain=True)  # the request before ended at once
    trees.begin(1, as_chain=False)
    trees.forget_earlier_owners()
    kept = [trees.trees.is_node[row].any().item() for row in range(4)]
    assert kept == [False, False, False, True]
    assert [trees.trees.depths[row].unique().tolist() for row in range(4)] == [[7], [1], [1], [7]]
    assert [trees.trees.probs[row].unique().tolist() for row in range(4)] == [[7], [0], [0], [7]]
    assert [trees.seen.num_said[row].unique().tolist() for row in range(4)] == [[7], [0], [0], [7]]
    assert trees.as_chain.tolist() == [False, False, True, False]
    trees.trees.is_node[1:3] = True
    trees.forget_earlier_owners()
    assert trees.trees.is_node[1:].all(), "once"


@pytest.mark.parametrize(
    ("is_prefilling", "kept"), [([False] * 3, [3, 3, 3, 3]), ([False, True, True], [3, 0, 3, 0])], ids=["none", "two"]
)
def test_what_follows_a_prompt_teaches_nothing(
    is_prefilling: list[bool], kept: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row's distributions are an earlier owner's, or those after an earlier piece of the prompt."""
    trees = store()

    def walk(*_: Any) -> str:  # of everyone
        trees.seen.num_said.fill_(3)
        return "verified"

    monkeypatch.setattr(RejectionSampler, "_verify_in_chunks", walk)
    sampler = TreeSampler.__new__(TreeSampler)
    sampler.trees = trees
    step = SimpleNamespace(
        has_prefill=any(is_prefilling),
        is_prefilling_np=np.array(is_prefilling),
        idx_mapping_np=np.array([2, 3, 1]),
        logits_indices=torch.arange(3),
    )
    assert sampler._verify_in_chunks(torch.zeros(3, 1), step, None, torch.zeros(3), torch.zeros(3)) == "verified"
    assert trees.seen.num_said.tolist() == kept


def test_what_layers_share_is_made_once_a_step() -> None:
    step, calls = TreeStep(store().rows, 2, 6, 4, is_whole=False), []

    def first(given: TreeStep, metadata: str) -> str:
        calls.append(metadata)
        return f"first of {metadata}"

    full, windowed = "full", "windowed"
    made = [
        step.once(full, first),
        step.once(windowed, first),
        step.once(full, lambda *_: "second"),
        step.once(full, first),
    ]
    assert made == ["first of full", "first of windowed", "second", "first of full"]
    assert calls == [full, windowed]
    assert [len(part) for part in step.of_verifying] == [2, 2, 2]


def batch(num_scheduled: list[int], num_drafts: list[int], num_draft_tokens: int | None = None) -> Any:
    """A step, of which the device may verify fewer candidates than were scheduled."""
    return SimpleNamespace(
        num_scheduled_tokens=np.array(num_scheduled),
        num_draft_tokens_per_req=np.array(num_drafts),
        num_draft_tokens=sum(num_drafts) if num_draft_tokens is None else num_draft_tokens,
    )


def test_who_leads_a_batch() -> None:
    assert verifying(batch([6, 3, 1, 40], [5, 2, 0, 0])) == (2, 9)
    assert verifying(batch([6, 3, 1, 40], [5, 2, 0, 0], num_draft_tokens=3)) == (2, 5)


def test_rows_before_a_root_are_refused() -> None:
    with pytest.raises(AssertionError, match="one more row each"):
        verifying(batch([8, 1], [5, 0]))


def test_a_row_sees_what_is_before_it() -> None:
    assert visible_slots(torch.tensor([2, 3]), 4, -1).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert visible_slots(torch.tensor([3, 4, 4, 6]), 3, -1).all()


def test_a_window_counts_positions() -> None:
    visible = visible_slots(torch.tensor([4, 5, 5, 6]), 4, 3)
    assert visible.int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]


# Targets and requests that cannot have trees.


@pytest.mark.parametrize("kind", [ChunkedLocalAttention, MLAAttention])
def test_layers_of_other_kinds_are_refused(kind: type[torch.nn.Module]) -> None:
    """Chunks have metadata of their own for the same implementation, latents no keys: neither is taken for a text's."""
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    target = torch.nn.ModuleDict({"mlp": torch.nn.Linear(1, 1), "attn": layer})
    with pytest.raises(ValueError, match=rf'"tree" is not available with {kind.__name__}, which attn is: leave it out'):
        use_tree_attention(target, store())


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, False),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_tokens": 4, "logprobs": 2}, False),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -0.1}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"bad_words": ["no"]}, True),
        ({"structured_outputs": StructuredOutputsParams(regex="a+")}, True),
    ],
)
def test_which_logits_depend_on_the_path(params: dict[str, Any], expected: bool) -> None:
    assert depends_on_path(SamplingParams(**params)) is expected


def test_processors_of_others_make_every_request_a_chain() -> None:
    state = TreeModelState.__new__(TreeModelState)
    state.vllm_config = SimpleNamespace(
        speculative_config=SimpleNamespace(
            num_speculative_tokens=5, enable_adaptive_verification=False, rejection_sample_method="standard"
        )
    )
    state.device, state.trees = CPU, store()
    for processors, expected in (([], False), ([BadWordsState.__new__(BadWordsState)], False), ([object()], True)):
        sampler = SimpleNamespace(logits_processors=processors)
        same, ours = state.custom_sampler(sampler)
        assert same is sampler and isinstance(ours, TreeSampler)
        assert state.all_as_chain is expected
