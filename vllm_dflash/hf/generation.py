# SPDX-License-Identifier: Apache-2.0
"""DFlash speculative decoding on Transformers, batch 1, as plainly as it can be said (paper, section 3; Algorithm 1).

One round: draft a block, verify it in one target forward, keep the longest prefix that the target itself would have
produced and the target's next token after it. What comes out is the target's own text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import DynamicCache

from vllm_dflash.hf.target_features import TargetFeatures

if TYPE_CHECKING:
    from vllm_dflash.hf.modeling import DFlashDraftModel


@dataclass(frozen=True)
class SpecGenerateOutput:
    """sequences: prompt and generated ids [1, n]. acceptance_lengths: tokens each round added, bonus token included."""

    sequences: torch.Tensor
    acceptance_lengths: list[int] = field(default_factory=list)


def spec_generate(
    draft: DFlashDraftModel,
    target: nn.Module,
    input_ids: torch.Tensor,  # [1, P]
    max_new_tokens: int,
    temperature: float = 0.0,
    stop_token_ids: list[int] | None = None,
) -> SpecGenerateOutput:
    """Generate up to `max_new_tokens` tokens, ending at the first stop token (which is kept).

    At temperature 0 the text equals greedy decoding of the target. Above, every emitted token is a sample of the
    target's distribution: a draft is kept exactly when the target's own sample equals it. Raises ValueError for a
    batch, an empty prompt, or a bad limit.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must be one non-empty prompt [1, P], found shape {list(input_ids.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    prompt_length = input_ids.shape[1]
    stop = set(stop_token_ids or ())
    target_cache, draft_cache = DynamicCache(), DynamicCache()
    with TargetFeatures(target, draft.target_layer_ids) as features:
        logits = target(input_ids, past_key_values=target_cache, use_cache=True, logits_to_keep=1).logits
        context = features.take()  # [1, T, F*H]
        tokens = input_ids[0].tolist() + choose(logits[0], temperature).tolist()
        acceptance_lengths: list[int] = []
        while len(tokens) - prompt_length < max_new_tokens and not stop & set(tokens[prompt_length:]):
            block = draft_block(draft, target, tokens, context, draft_cache)  # [1, Q]
            logits = target(block, past_key_values=target_cache, use_cache=True).logits
            chosen = choose(logits[0], temperature).tolist()  # chosen[i] follows block[i]
            accepted = count_accepted(block[0, 1:].tolist(), chosen)
            drop_last(target_cache, block.shape[1] - 1 - accepted)
            context = features.take()[:, : accepted + 1]
            tokens += chosen[: accepted + 1]
            acceptance_lengths.append(accepted + 1)
    tokens = truncate(tokens, prompt_length, max_new_tokens, stop)
    return SpecGenerateOutput(input_ids.new_tensor([tokens]), acceptance_lengths)


def draft_block(
    draft: DFlashDraftModel,
    target: nn.Module,
    tokens: list[int],
    context: torch.Tensor,  # [1, T, F*H]: features of the rows the target ran since the last round
    cache: DynamicCache,  # K/V of all earlier context rows
) -> torch.Tensor:
    """The block [anchor, K drafts] as ids [1, Q]. The anchor is the last token, which the target has not seen yet."""
    num_context = len(tokens) - 1
    block = torch.full((1, draft.block_size), draft.mask_token_id, device=context.device)
    block[0, 0] = tokens[-1]
    first = cache.get_seq_length()
    position_ids = torch.arange(first, num_context + draft.block_size, device=context.device)[None]
    hidden = draft(
        position_ids=position_ids,
        noise_embedding=draft.embed(block, target),
        target_hidden=context,
        past_key_values=cache,
    )
    drop_last(cache, draft.block_size)
    block[0, 1:] = draft.draft_logits(hidden[:, 1:], target).argmax(dim=-1)
    return block


def drop_last(cache: DynamicCache, num_rows: int) -> None:
    """Remove the newest rows of a K/V cache: rejected drafts, or a block's own scratch rows."""
    if num_rows > 0:
        cache.crop(-num_rows)


def choose(
    logits: torch.Tensor,  # [S, V]
    temperature: float,
) -> torch.Tensor:
    """The target's token at every row [S]: its argmax, or a sample at temperature > 0."""
    if temperature <= 0.0:
        return logits.argmax(dim=-1)
    return torch.multinomial((logits.float() / temperature).softmax(dim=-1), num_samples=1)[:, 0]


def count_accepted(drafts: list[int], chosen: list[int]) -> int:
    """How many leading drafts equal the target's own choices."""
    accepted = 0
    for drafted, wanted in zip(drafts, chosen, strict=False):
        if drafted != wanted:
            break
        accepted += 1
    return accepted


def truncate(tokens: list[int], prompt_length: int, max_new_tokens: int, stop: set[int]) -> list[int]:
    """Cut at the token limit, and right after the first generated stop token."""
    tokens = tokens[: prompt_length + max_new_tokens]
    for index in range(prompt_length, len(tokens)):
        if tokens[index] in stop:
            return tokens[: index + 1]
    return tokens
