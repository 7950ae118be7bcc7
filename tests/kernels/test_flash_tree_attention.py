# SPDX-License-Identifier: Apache-2.0
"""FlashAttention over the prefixes and the trees' part after it, against one softmax over both. On a GPU."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.kernels.test_window_tree_attention import Step
from vllm_dflash.compat.trees.store import TreeStep
from vllm_dflash.kernels.tree_attention import merge_tree_attention
from vllm_dflash.tree import packed_mask

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("num_splits", [0, 32])
def test_as_texts(device: str, num_splits: int, sinks: bool) -> None:
    """A request without candidates is the prefix's last row; padding and a text's first row have no prefix."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    step = Step([700, 33, 1, 5, 0], [16, 0, 9, 12, 4], (8, 2), 64, torch.bfloat16, device, sinks)
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
    states = (step.query[1:], step.key[1:], step.value[1:])
    merge_tree_attention(out[1:], lse, *states, words, *rows, step.scale, sinks=step.sinks)
    for request, start in enumerate(step.starts):
        wanted = step.expected(request, window=1 << 20)
        torch.testing.assert_close(out[start : start + len(wanted)].float(), wanted, rtol=2e-2, atol=2e-2)


class Batch:
    """A step as a layer of vLLM's gets it: requests with candidates lead, a piece of a prompt and a row follow."""

    def __init__(
        self,
        prompts: list[tuple[int, int]],  # cached tokens and new ones of each request behind those with candidates
        device: str,
        num_splits: int,
        has_plan: bool,
        window: int | None,
    ) -> None:
        from vllm.v1.attention.backends.fa_utils import get_scheduler_metadata
        from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadata

        from vllm_dflash.compat.trees.attention_flash import FlashTreeAttention

        self.window = 1 << 20 if window is None else window
        self.verifying = Step([700, 33, 1, 5], [16, 2, 9, 12], (8, 2), 64, torch.bfloat16, device, sinks=False)
        self.prompts = prompts
        lengths = [cached + new for cached, new in prompts]
        self.texts = [torch.randn(length, 4, 64, device=device).bfloat16() for length in lengths]  # keys, values
        num_new = sum(new for _, new in prompts)
        of_trees = self.verifying
        self.query = torch.cat((of_trees.query[1:], torch.randn(num_new, 8, 64, device=device).bfloat16()))
        new_states = [text[cached:] for text, (cached, _) in zip(self.texts, prompts, strict=True)]
        keys, values = (
            torch.cat((states[1:], *(text[:, heads] for text in new_states)))
            for states, heads in ((of_trees.key, slice(0, 2)), (of_trees.value, slice(2, 4)))
        )
        self.key, self.value = keys, values
        self.cache, table = self._paged(device)
        counts = [*of_trees.num_rows, *(new for _, new in prompts)]
        starts = torch.nn.functional.pad(torch.tensor(counts, device=device).cumsum(0), (1, 0)).int()
        prefixes = zip(of_trees.prefix_lens, of_trees.num_rows, strict=True)
        lens = torch.tensor([sum(pair) for pair in prefixes] + lengths, dtype=torch.int32, device=device)
        self.metadata = FlashAttentionMetadata(
            len(self.query), max(counts), starts, 1024, lens, table, torch.zeros(0), max_num_splits=num_splits
        )
        if has_plan:
            self.metadata.scheduler_metadata = get_scheduler_metadata(
                batch_size=len(lens), max_seqlen_q=max(counts), max_seqlen_k=1024, num_heads_q=8, num_heads_kv=2,
                headdim=64, cache_seqlens=lens, qkv_dtype=torch.bfloat16, cu_seqlens_q=starts, page_size=16,
                causal=True, num_splits=num_splits,
            )  # fmt: skip
        self.layer = FlashAttentionImpl(8, 64, of_trees.scale, 2, None, window, "auto")
        self.layer.__class__ = FlashTreeAttention
        self.layer.trees = self._store()

    def _paged(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The verifying requests' cache with the prompts' blocks behind it, and everyone's table."""
        cache, table = self.verifying.cache, self.verifying.table
        more = [torch.full((table.shape[1], 2, 16, 128), math.nan, device=device).bfloat16() for _ in self.prompts]
        for blocks, text in zip(more, self.texts, strict=True):
            slots = torch.arange(len(text), device=device)
            blocks[slots // 16, :, slots % 16] = torch.cat((text[:, :2], text[:, 2:]), dim=2)
        numbers = torch.arange(len(cache), len(cache) + len(more) * table.shape[1], device=device)
        table = torch.cat((table, numbers.view(len(more), table.shape[1]).int()))
        # As vLLM has it: rows of a block side by side.
        return torch.cat((cache, *more)).transpose(1, 2).contiguous().transpose(1, 2), table

    def _store(self) -> SimpleNamespace:
        words = packed_mask(self.verifying.ancestors.flip(0)).to(self.query.device)
        num_rows = sum(self.verifying.num_rows)
        rows = self.verifying.verified  # there row 0 is another's
        rows = replace(rows, first_rows=rows.first_rows - 1, positions=rows.positions[1:])
        step = TreeStep(rows, len(self.verifying.num_rows), num_rows, max_rows=16, is_whole=False)
        return SimpleNamespace(step=step, trees=SimpleNamespace(words=words))

    def run(self) -> torch.Tensor:
        out, one = torch.full_like(self.query, -7.0), torch.ones(1, device=self.query.device)
        scales = SimpleNamespace(_q_scale=one, _k_scale=one, _v_scale=one)
        self.layer.forward(scales, self.query, self.key, self.value, self.cache, self.metadata, out)
        return out

    def expected_of_prompt(self, index: int) -> torch.Tensor:
        """[new rows, heads, D] fp32: each over the text up to itself, as far as its window reaches."""
        (cached, new), text = self.prompts[index], self.texts[index].float()
        start = int(self.metadata.query_start_loc[len(self.verifying.num_rows) + index])
        keys, values = (half.repeat_interleave(4, dim=1) for half in text.split(2, dim=1))
        scores = torch.einsum("qhd,khd->hqk", self.query[start : start + new].float(), keys) * self.verifying.scale
        places = torch.arange(cached + new, device=text.device)
        ahead = places - places[cached:, None]
        scores = scores.masked_fill((ahead > 0) | (ahead <= -self.window), -math.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), values)


@pytest.mark.parametrize("window", [None, 24], ids=["no window", "window"])
@pytest.mark.parametrize("has_plan", [False, True], ids=["no plan", "plan"])
@pytest.mark.parametrize("num_splits", [0, 32])
@pytest.mark.parametrize("prompts", [[], [(0, 300)], [(48, 70), (500, 1), (0, 5)]], ids=["none", "one", "three"])
def test_a_layer(
    device: str, prompts: list[tuple[int, int]], num_splits: int, has_plan: bool, window: int | None
) -> None:
    """Layers of a step share what is made once: a second call gives the same."""
    batch = Batch(prompts, device, num_splits, has_plan, window)
    for _ in range(2):
        out = batch.run()
        wanted = [batch.verifying.expected(request, batch.window) for request in range(4)]
        wanted += [batch.expected_of_prompt(index) for index in range(len(prompts))]
        torch.testing.assert_close(out.float(), torch.cat(wanted), rtol=2e-2, atol=2e-2)
