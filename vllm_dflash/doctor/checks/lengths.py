# SPDX-License-Identifier: Apache-2.0
"""Draft tokens a step, and how long a request may get."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_dflash.doctor.facts import Facts
from vllm_dflash.doctor.finding import Finding, error, info, ok, warning
from vllm_dflash.validation import check_limits, resolve_num_speculative_tokens


def check_block_size(facts: Facts) -> Iterator[Finding]:
    """Whether the block holds as many draft tokens as are asked for."""
    config, asked = facts.drafter.config, facts.asked.num_speculative_tokens
    if config is None or not facts.drafter.can_read("block_size"):
        return
    try:
        k = resolve_num_speculative_tokens(config, asked)
    except ValueError as problem:
        yield error("block-size", str(problem), f"-k {config.num_speculative_tokens}, or leave it out")
        return
    told = "all that the block holds" if k == config.num_speculative_tokens else f"of {config.num_speculative_tokens}"
    yield ok("block-size", f"block of {config.block_size}, K = {k} draft tokens a step, {told}")
    if facts.context_length is not None:
        try:
            check_limits(k, facts.context_length, None)
        except ValueError as problem:
            yield error("context-length", str(problem), "raise --max-model-len, or lower -k")


def check_context_length(facts: Facts) -> Iterator[Finding]:
    """Whether drafter and target know positions as far as requests may go."""
    id, config, length = "context-length", facts.drafter.config, facts.context_length
    if config is None or length is None or not facts.drafter.can_read("max_position_embeddings"):
        return
    of_target, of_drafter = facts.target.number("max_position_embeddings"), config.max_position_embeddings
    if of_target is not None and length > of_target:
        yield error(
            id,
            f"--max-model-len {length} is more than the target's max_position_embeddings = {of_target}",
            f"--max-model-len {of_target}, or less",
        )
    elif "max_position_embeddings" not in facts.drafter.flat:
        yield info(
            id, f"requests of up to {length} tokens; the drafter's config.json does not tell how far it was made for"
        )
    elif of_drafter < length:
        yield warning(
            id,
            f"requests may have {length} tokens, the drafter's max_position_embeddings is {of_drafter}: beyond that, "
            "acceptance falls",
            f"--max-model-len {of_drafter}, or a drafter that was trained on longer texts",
        )
    else:
        yield ok(id, f"up to {length} tokens; the drafter's positions go to {of_drafter}")
