# SPDX-License-Identifier: Apache-2.0
"""The tensors of both checkpoints: there, whole, of the right shapes, and not plainly empty."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vllm_dflash.checkpoint import tensor_problems
from vllm_dflash.config import is_dflash_checkpoint
from vllm_dflash.doctor.checks.memory import size_text
from vllm_dflash.doctor.facts import Facts, Weights
from vllm_dflash.doctor.finding import Finding, error, info, ok

_DOWNLOAD = "download the checkpoint again, or compare with its publisher's"
_CHANGES = {
    "missing": _DOWNLOAD,
    "shape": "config.json and weights are not of the same drafter: take both from one place",
    "extra": "config.json and weights are not of the same drafter, or it is of another kind: take both from one place",
}
#: Keys that tensors' shapes follow from. With a stand-in for one of them there is nothing to compare with.
_SHAPE_KEYS = (
    "draft_vocab_size", "head_dim", "hidden_size", "intermediate_size", "layer_types", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "target_hidden_size", "target_layer_ids", "vocab_size",
)  # fmt: skip
#: So many names are shown.
_MOST_NAMES = 4
#: Of these, zeros are values like any other.
_MAY_BE_ZERO = (".bias", "d2t", "t2d")


def check_drafter_tensors(facts: Facts) -> Iterator[Finding]:
    """Files, names and shapes by the headers, values by samples."""
    drafter, weights = facts.drafter, facts.drafter.weights
    found = [*_files(weights, "tensors-file", "the drafter"), *_values(weights, "tensors-values", "the drafter")]
    config = drafter.config
    # The rest of a checkpoint with a broken file is missing, which says nothing new.
    is_whole = weights.has_headers and not weights.problems
    if config is not None and drafter.can_read(*_SHAPE_KEYS) and is_whole and is_dflash_checkpoint(drafter.raw):
        shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
        problems = [] if config.is_quantized else list(tensor_problems(config, shapes))
        found += [error(f"tensors-{kind}", message, _CHANGES[kind]) for kind, message in problems]
    yield from found
    if not found:
        yield ok("tensors", f"all {len(weights.tensors)} there, none empty ({size_text(weights.num_bytes)})")


def check_target_weights(facts: Facts) -> Iterator[Finding]:
    """Broken files and broken values of the target: its drafter cannot be better."""
    id, weights = "target-weights", facts.target.weights
    found = [*_files(weights, id, "the target"), *_values(weights, id, "the target", zeros=False)]
    yield from found
    if not found:
        yield ok(id, f"{len(weights.tensors)} tensors ({size_text(weights.num_bytes)})")


def _files(weights: Weights, id: str, whose: str) -> Iterator[Finding]:
    for problem in weights.problems:
        if not weights.has_headers and problem.endswith(".bin"):
            yield info(id, f"{whose}'s weights are no safetensors, so they were not looked at: {problem}")
        else:
            yield error(id, problem, _DOWNLOAD)


def _values(weights: Weights, id: str, whose: str, zeros: bool = True) -> Iterator[Finding]:
    """Tensors whose sampled values are all zero, or not numbers."""
    empty = [name for name, tensor in weights.tensors.items() if tensor.is_zero and not name.endswith(_MAY_BE_ZERO)]
    broken = [name for name, tensor in weights.tensors.items() if tensor.is_finite is False]
    if zeros and empty:
        yield error(id, f"{whose}'s {_some(empty)}: all zeros", _DOWNLOAD)
    if broken:
        yield error(id, f"{whose}'s {_some(broken)}: NaN or infinity among the values", _DOWNLOAD)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
