# SPDX-License-Identifier: Apache-2.0
"""The likeliest tokens of every row, against torch's log-softmax and top-k over the whole of it."""

from __future__ import annotations

import pytest
import torch

from vllm_dflash.kernels.top_choices import CHUNK, reference_top_choices, top_choices


@pytest.mark.parametrize(
    ("vocab_size", "num_choices"),
    [(50, 7), (50, 50), (CHUNK * 8, 8), (CHUNK * 8 + 1, 8), (5000, 3), (5003, 31)],
    ids=["one chunk", "all", "as many chunks", "one more", "few", "ragged"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_in_torch(device: str, vocab_size: int, num_choices: int, dtype: torch.dtype) -> None:
    torch.manual_seed(vocab_size)
    logits = (4 * torch.randn(5, vocab_size + 3, device=device)).to(dtype)[:, :vocab_size]  # strided, as gathered ones
    scales = torch.tensor([1.0, 0.5, 2.0, 1.3, 0.05], device=device)
    log_probs, token_ids = top_choices(logits, scales, num_choices)
    whole = (logits.float() * scales[:, None]).log_softmax(dim=1)
    torch.testing.assert_close(log_probs, whole.topk(num_choices, dim=1).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_probs, whole.gather(1, token_ids), rtol=1e-5, atol=1e-5)
    assert all(len(set(row)) == num_choices for row in token_ids.tolist())
    wanted, ids = reference_top_choices(logits, scales, num_choices)
    torch.testing.assert_close(log_probs, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(wanted, whole.gather(1, ids), rtol=1e-5, atol=1e-5)


def test_the_likeliest_in_one_chunk(device: str) -> None:
    logits = torch.zeros(1, 40 * CHUNK, device=device)
    logits[0, 3 * CHUNK : 3 * CHUNK + 9] = torch.arange(9.0, 0.0, -1.0, device=device)
    _, token_ids = top_choices(logits, torch.ones(1, device=device), 9)
    assert token_ids.tolist() == [[3 * CHUNK + place for place in range(9)]]


def test_what_cannot_be_chosen(device: str) -> None:
    """Rows of a reduced draft vocabulary: all but three tokens are -inf, in the last of many chunks."""
    logits = torch.full((1, 30 * CHUNK), float("-inf"), device=device)
    logits[0, -3:] = torch.tensor([0.0, 2.0, 1.0], device=device)
    log_probs, token_ids = top_choices(logits, torch.ones(1, device=device), 5)
    assert token_ids[0, :3].tolist() == [30 * CHUNK - 2, 30 * CHUNK - 1, 30 * CHUNK - 3]
    expected = torch.tensor([2.0, 1.0, 0.0], device=device).log_softmax(dim=0)
    torch.testing.assert_close(log_probs[0, :3], expected)
    assert log_probs[0, 3:].tolist() == [float("-inf")] * 2
    assert len(set(token_ids[0].tolist())) == 5 and token_ids.max() < 30 * CHUNK


def test_of_equal_ones_the_lowest(device: str) -> None:
    logits = torch.zeros(1, 50 * CHUNK, device=device)
    logits[0, 7 * CHUNK] = 1.0
    _, token_ids = top_choices(logits, torch.ones(1, device=device), 4)
    assert token_ids.tolist() == [[7 * CHUNK, 0, 1, 2]]
