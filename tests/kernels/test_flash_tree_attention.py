# SPDX-License-Identifier: Apache-2.0
"""FlashAttention over the prefixes and the trees' part after it, against one softmax over both. On a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_window_tree_attention import Step
from vllm_dflash.kernels.tree_attention import merge_tree_attention
from vllm_dflash.tree import packed_mask

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("num_splits", [0, 32])
def test_as_texts(device: str, num_splits: int, sinks: bool) -> None:
    """A request without candidates is the prefix's last row; one of padding has no prefix."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    step = Step([700, 33, 1, 5], [16, 0, 9, 12], (8, 2), 64, torch.bfloat16, device, sinks)
    verified, out = step.verified, torch.full_like(step.query, -7.0)
    counts = torch.tensor([max(count, 1) for count in step.num_rows] + [0], device=device)
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    keys, values = step.cache.transpose(1, 2).split(64, dim=-1)
    table = torch.nn.functional.pad(step.table, (0, 0, 0, 1))
    _, lse = flash_attn_varlen_func(
        q=step.query[1:], k=keys, v=values, out=out[1:], cu_seqlens_q=starts, max_seqlen_q=16,
        seqused_k=verified.prefix_lens, max_seqlen_k=1024, softmax_scale=step.scale, causal=False, block_table=table,
        num_splits=num_splits, fa_version=get_flash_attn_version(), s_aux=step.sinks, return_softmax_lse=True,
    )  # fmt: skip
    words = packed_mask(step.ancestors.flip(0)).to(device)
    rows = (verified.state_rows, verified.first_rows - 1, verified.num_rows)
    merge_tree_attention(out[1:], lse, step.query[1:], step.key[1:], step.value[1:], words, *rows, step.scale)
    for request, start in enumerate(step.starts):
        wanted = step.expected(request, window=1 << 20)
        torch.testing.assert_close(out[start : start + len(wanted)].float(), wanted, rtol=2e-2, atol=2e-2)
