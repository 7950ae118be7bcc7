# SPDX-License-Identifier: Apache-2.0
"""spec_generate(compile=True): on a CPU all of it but the capture itself, which a GPU test adds.

A graph is stood in for by the function that it would have recorded: it too reads fixed memory and writes fixed memory.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch
from transformers import Qwen3ForCausalLM

from tests.helpers import drafter, target
from vllm_dflash.hf import DFlashDraftModel, SpecGenerateOutput, graphs, options
from vllm_dflash.hf.graphs import padded_slots

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[5, 9, 2, 40, 7], [0, 0, 81, 3, 17]]
MASK = [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


class HostMark:
    """What an event is on a device."""

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: HostMark) -> float:
        return 1000.0 * (end.at - self.at)


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a CPU is, a stand-in for capture that keeps to its contract: what runs at first must not count."""
    if request.param == "cpu":

        def recorded(warm_up: Callable, run: Callable, generator: torch.Generator | None) -> Callable:
            warm_up()
            return run

        monkeypatch.setattr(graphs, "capture", recorded)
        monkeypatch.setattr(graphs, "mark", HostMark)
        monkeypatch.setattr(options, "check_device", lambda *_: None)
    return request.param


@pytest.fixture
def model(device: str) -> Qwen3ForCausalLM:
    return target().to(device)


def greedy(model: Qwen3ForCausalLM, rows: slice, num_tokens: int) -> list[list[int]]:
    ids, mask = (torch.tensor(part[rows], device=model.device) for part in (PROMPTS, MASK))
    return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=num_tokens, pad_token_id=0).tolist()


def generate(
    draft: DFlashDraftModel, model: Qwen3ForCausalLM, rows: slice, num_tokens: int, **options: Any
) -> SpecGenerateOutput:
    ids, mask = (torch.tensor(part[rows], device=model.device) for part in (PROMPTS, MASK))
    output = draft.to(model.device).spec_generate(
        ids, model, num_tokens, attention_mask=mask, return_stats=True, **({"compile": True} | options)
    )
    assert isinstance(output, SpecGenerateOutput)
    return output


@pytest.mark.parametrize("rows", [slice(1), slice(2)], ids=["one", "ragged batch"])
@pytest.mark.parametrize("tree_budget", [None, 9, "auto"], ids=["chain", "tree", "auto"])
def test_the_text_is_the_targets(model: Qwen3ForCausalLM, rows: slice, tree_budget: int | str | None) -> None:
    draft = drafter(block_size=5)
    compiled = generate(draft, model, rows, 60, tree_budget=tree_budget)
    assert compiled.sequences.tolist() == greedy(model, rows, 60)
    if tree_budget == "auto":
        assert len(compiled.budgets) >= max(map(len, compiled.acceptance_lengths_by_row))
        assert set(compiled.budgets) >= {3, 7, 15, 31, 63, 127}
        return
    eager = generate(draft, model, rows, 60, tree_budget=tree_budget, compile=False)
    assert compiled.acceptance_lengths_by_row == eager.acceptance_lengths_by_row


def test_drafts_are_those_without_graphs(model: Qwen3ForCausalLM) -> None:
    """A drafter that is often right, so that accepted ways are of every length: the target's own layers draft."""
    draft = drafter(block_size=5)
    eager = generate(draft, model, slice(1), 40, tree_budget=60, compile=False)
    assert len(set(eager.acceptance_lengths)) > 1
    assert generate(draft, model, slice(1), 40, tree_budget=60).acceptance_lengths == eager.acceptance_lengths


def test_windows_grow_with_the_text(model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "SMALLEST_WINDOW", 16)
    draft = drafter(block_size=5)
    assert generate(draft, model, slice(2), 60).sequences.tolist() == greedy(model, slice(2), 60)
    assert len(draft.workspace.replays) >= 3


def test_a_second_call_uses_the_graphs_of_the_first(model: Qwen3ForCausalLM) -> None:
    draft = drafter(block_size=5)
    generate(draft, model, slice(1), 60)
    kept = draft.workspace
    assert generate(draft, model, slice(1, 2), 50).sequences.tolist() == greedy(model, slice(1, 2), 50)
    assert draft.workspace is kept
    generate(draft, model, slice(2), 50)
    assert draft.workspace is not kept


@pytest.mark.parametrize("changes", [{"temperature": 1.0}, {"tree_budget": 6}, {"max_new_tokens": 300}])
def test_what_graphs_cannot_serve_gets_its_own(model: Qwen3ForCausalLM, changes: dict[str, Any]) -> None:
    draft = drafter(block_size=5)
    generate(draft, model, slice(1), 8)
    kept = draft.workspace
    num_tokens = changes.pop("max_new_tokens", 8)
    generate(draft, model, slice(1), num_tokens, **changes)
    assert draft.workspace is not kept


def test_a_pair_that_was_cast_gets_new_ones(model: Qwen3ForCausalLM) -> None:
    draft = drafter(block_size=5)
    generate(draft, model, slice(1), 8)
    kept = draft.workspace
    expected = greedy(model.double(), slice(1), 30)
    assert generate(draft.double(), model, slice(1), 30).sequences.tolist() == expected
    assert draft.workspace is not kept


def test_rows_that_stop_early(model: Qwen3ForCausalLM) -> None:
    expected = greedy(model, slice(2), 30)
    stop = expected[0][5 + 7]
    ends = [next((i for i, token in enumerate(row[5:]) if token == stop), 29) + 1 for row in expected]
    assert ends[0] != ends[1]
    draft = drafter(block_size=5)
    output = generate(draft, model, slice(2), 30, stop_token_ids=[stop])
    width = max(ends)
    assert output.sequences.tolist() == [
        row[: 5 + end] + [0] * (width - end) for row, end in zip(expected, ends, strict=True)
    ]
    early = ends.index(min(ends))
    longest = sum(MASK[early]) + min(ends) + 2 * 5  # its slots: a round that was under way, and none after it
    assert int(draft.workspace.state.lengths[early]) <= longest < sum(MASK[early]) + 30


def test_a_seed_decides_the_samples(model: Qwen3ForCausalLM) -> None:
    draft = drafter(block_size=5)

    def sample(seed: int) -> list[list[int]]:
        generator = torch.Generator(device=model.device).manual_seed(seed)
        return generate(draft, model, slice(1), 30, temperature=1.0, generator=generator).sequences.tolist()

    assert sample(1) == sample(1) != sample(2)


def test_a_copy_has_no_graphs(model: Qwen3ForCausalLM) -> None:
    draft = drafter(block_size=5)
    generate(draft, model, slice(1), 8)
    assert draft.workspace is not None and copy.deepcopy(draft).workspace is None


@pytest.mark.parametrize(
    ("num_slots", "expected"), [(1, 256), (256, 256), (257, 512), (1100, 1280), (2048, 2048), (2049, 2560)]
)
def test_padded_slots(num_slots: int, expected: int) -> None:
    assert padded_slots(num_slots) == expected


def test_without_a_gpu() -> None:
    with pytest.raises(ValueError, match="compile=True makes CUDA graphs, and input_ids is on cpu"):
        drafter().spec_generate(torch.tensor([[1, 2]]), target(), 4, compile=True)
