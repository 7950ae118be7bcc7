# SPDX-License-Identifier: Apache-2.0
"""Embedding and LM head: the target's, or the drafter's own."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_dflash.doctor.checks.memory import size_text
from vllm_dflash.doctor.facts import Facts, TensorFacts, Weights
from vllm_dflash.doctor.finding import Finding, error, info, ok, warning
from vllm_dflash.validation import check_own_tables

EMBEDDING, LM_HEAD = "embed_tokens.weight", "lm_head.weight"
_IDS = {EMBEDDING: "embedding", LM_HEAD: "lm-head"}


def check_tables(facts: Facts) -> Iterator[Finding]:
    """Which tables the drafter brings, whether it must, and whether they differ from the target's."""
    config, weights = facts.drafter.config, facts.drafter.weights
    if config is None or not weights.has_headers or config.is_quantized:
        return
    if facts.drafter.can_read("hidden_size", "target_hidden_size") and not weights.problems:
        try:
            check_own_tables(config, weights.tensors)
        except ValueError as problem:
            yield error("lm-head", str(problem), "take a checkpoint that has them, or the drafter of this very target")
            return
    for name, id in _IDS.items():
        if name in weights.tensors:
            yield _own(id, weights.tensors[name], _table_of(facts, name))
        elif name == EMBEDDING or config.draft_vocab_size == config.vocab_size:
            yield ok(id, "the target's")
    yield from _reduced(facts)
    yield from _tied(facts)


def _table_of(facts: Facts, name: str) -> TensorFacts | None:
    """The target's table of that name; its embedding is its LM head too where they are tied."""
    found = _ending(facts.target.weights, name)
    is_tied = bool(facts.target.raw.get("tie_word_embeddings", facts.target.text.get("tie_word_embeddings")))
    return _ending(facts.target.weights, EMBEDDING) if found is None and is_tied else found


def _ending(weights: Weights, name: str) -> TensorFacts | None:
    return next((tensor for full, tensor in weights.tensors.items() if f".{full}".endswith(f".{name}")), None)


def _own(id: str, own: TensorFacts, of_target: TensorFacts | None) -> Finding:
    size = size_text(own.num_bytes)
    if of_target is None or None in (own.digest, of_target.digest) or own.dtype != of_target.dtype:
        return info(id, f"the drafter's own ({size})")
    if own.digest == of_target.digest and own.shape == of_target.shape:
        return info(
            id,
            f"the drafter's own, with the target's values ({size})",
            f"leave it out of the checkpoint to save {size} of memory",
        )
    return info(id, f"the drafter's own ({size}), with other values than the target's")


def _reduced(facts: Facts) -> Iterator[Finding]:
    config = facts.drafter.config
    if config is None or config.draft_vocab_size == config.vocab_size:
        return
    share = config.draft_vocab_size / config.vocab_size
    yield info(
        "draft-vocabulary",
        f"drafts {config.draft_vocab_size} of {config.vocab_size} tokens ({share:.0%}): a block ends before any other",
    )


def _tied(facts: Facts) -> Iterator[Finding]:
    tensors = facts.drafter.weights.tensors
    if facts.drafter.flat.get("tie_word_embeddings") and EMBEDDING in tensors and LM_HEAD not in tensors:
        yield warning(
            "lm-head",
            "tie_word_embeddings = true with an embedding of the drafter's own and no LM head: the target's is used",
            "if the drafter was trained with its own embedding as LM head, save that as lm_head.weight too",
        )
