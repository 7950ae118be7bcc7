# SPDX-License-Identifier: Apache-2.0
"""Speculative sampling (Leviathan et al., arXiv 2211.17192, section 2.3; Chen et al., arXiv 2302.01318, algorithm 2).

A drafted token, a sample of q, is kept with probability min(1, p/q), and the first one that is not is replaced by a
sample of what q lacks of p. So every token is a sample of p, whatever q is, and one is kept with probability
sum(min(p, q)), more often than a sample of p happens to be q's likeliest.

Letters: B sequences, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_dflash.tree import Walk

if TYPE_CHECKING:
    from vllm_dflash.hf.choosing import Sampling


def reject(
    token_ids: torch.Tensor,  # [B, K] int64; samples of `draft_probs`
    draft_probs: torch.Tensor,  # [B, K, V] fp32
    logits: torch.Tensor,  # [B, 1+K, V] of the target: row k is for token k, and the last row for one more
    sampling: Sampling,
) -> Walk:
    """The kept tokens as nodes of a chain, and the target's own after them."""
    num_drafted = token_ids.shape[1]
    probs = sampling.probs(logits)  # [B, 1+K, V]
    of_target, of_draft = (p[:, :num_drafted].gather(2, token_ids[..., None])[..., 0] for p in (probs, draft_probs))
    uniform = torch.empty_like(of_draft).uniform_(generator=sampling.generator)
    kept = (uniform * of_draft < of_target).cumprod(dim=1)  # [B, K]
    num_accepted = kept.sum(dim=1)
    row = num_accepted[:, None, None].expand(-1, 1, probs.shape[2])
    whole = probs.gather(1, row)[:, 0]  # [B, V]
    drafted = draft_probs.gather(1, row.clamp(max=num_drafted - 1))[:, 0]
    drafted = drafted * (num_accepted < num_drafted)[:, None]  # behind a chain that was kept whole there is no draft
    rest = (whole - drafted).clamp(min=0.0)
    rest = torch.where(rest.sum(dim=1, keepdim=True) > 0.0, rest, whole)  # equal but for rounding: nothing is lacking
    nodes = torch.arange(num_drafted, device=token_ids.device).expand_as(token_ids)
    return Walk(torch.where(kept.bool(), nodes, -1), num_accepted, sampling.sample(rest))
