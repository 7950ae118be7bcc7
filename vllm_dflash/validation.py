# SPDX-License-Identifier: Apache-2.0
"""Start-up checks of a drafter, its target and the options. Torch-free; every error names what to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vllm_dflash.checkpoint import check_tensors, read_tensor_shapes
from vllm_dflash.config import DFlashConfig
from vllm_dflash.options import AUTO, MAX_NODES, DFlashOptions
from vllm_dflash.whole_numbers import is_whole


@dataclass(frozen=True)
class TargetFacts:
    """What the checks must know of a target model."""

    model: str
    num_hidden_layers: int
    hidden_size: int
    vocab_size: int


def resolve_num_speculative_tokens(config: DFlashConfig, requested: int | None) -> int:
    """K: what was asked for, or all the block offers. Raises ValueError for more than that.

    A larger K would draft at block positions the drafter never saw in training (paper, table 8).
    """
    if requested is None:
        return config.num_speculative_tokens
    if not is_whole(requested):
        raise ValueError(
            f'--speculative-config\'s "num_speculative_tokens" must be a positive integer, found {requested!r}'
        )
    if requested > config.num_speculative_tokens:
        raise ValueError(
            f'--speculative-config\'s "num_speculative_tokens" = {requested}, but {config.source} has block_size = '
            f"{config.block_size} in its config.json and drafts at most {config.num_speculative_tokens} tokens"
        )
    return requested


def resolve_num_tree_nodes(options: DFlashOptions, requested: int | None) -> int:
    """What vLLM's scheduler takes for K with draft trees: a slot a node. Where these follow the load, K is their most.

    Raises ValueError where K says otherwise.
    """
    num_nodes = options.num_tree_nodes
    assert num_nodes is not None, "no tree is asked for"
    if options.tree == AUTO and requested is not None:
        if not isinstance(requested, int) or not 1 <= requested <= MAX_NODES:
            raise ValueError(
                f'--speculative-config\'s "num_speculative_tokens" = {requested!r}: the most nodes of a "tree": "auto" '
                f"must be from 1 to {MAX_NODES}"
            )
        return requested
    if requested not in (None, num_nodes):
        raise ValueError(
            f'--speculative-config\'s "num_speculative_tokens" = {requested!r}, but --additional-config\'s "dflash" '
            f'asks for a "tree" of {num_nodes} nodes, all of which are verified: leave "num_speculative_tokens" out'
        )
    return num_nodes


def check_limits(
    num_speculative_tokens: int,
    max_model_len: int,
    drafter_max_model_len: int | None,
    has_fixed_tree: bool = False,
) -> None:
    """Whether a block, or a tree, fits the lengths asked for. Raises ValueError naming the flag."""
    if drafter_max_model_len is not None:
        raise ValueError(
            f'--speculative-config\'s "max_model_len" = {drafter_max_model_len} is not supported: drafting follows '
            "--max-model-len request by request"
        )
    if max_model_len <= num_speculative_tokens:
        kind, flag = "block", '--speculative-config\'s "num_speculative_tokens"'
        if has_fixed_tree:
            kind, flag = "tree", '--additional-config\'s "dflash": "tree"'
        raise ValueError(
            f"--max-model-len {max_model_len} leaves no room for a {kind} of 1 + {num_speculative_tokens} rows: "
            f"lower {flag}"
        )


class PairProblem(NamedTuple):
    """What differs (`part` is a stable name of it), and how."""

    part: str
    message: str


def check_pair(config: DFlashConfig, target: TargetFacts) -> None:
    """Whether a drafter was made for such a target. Raises ValueError with the key and both values."""
    for problem in pair_problems(config, target):
        raise ValueError(problem.message)


def pair_problems(config: DFlashConfig, target: TargetFacts) -> Iterator[PairProblem]:
    """All that says that a drafter was not made for such a target."""
    last = config.target_layer_ids[-1]
    if last >= target.num_hidden_layers:
        yield PairProblem(
            "target-layers",
            f"{config.source}: dflash_config.target_layer_ids {list(config.target_layer_ids)} reach layer {last}, but "
            f"the target {target.model} has layers 0..{target.num_hidden_layers - 1}",
        )
    if config.num_target_layers not in (None, target.num_hidden_layers):
        yield PairProblem(
            "target-depth",
            f"{config.source}: num_target_layers = {config.num_target_layers}, but the target {target.model} has "
            f"{target.num_hidden_layers}: this drafter was trained for another target",
        )
    if config.target_hidden_size != target.hidden_size:
        yield PairProblem(
            "hidden-size",
            f"{config.source}: the drafter reads target features of width {config.target_hidden_size} "
            f"(target_hidden_size, else hidden_size), but the target {target.model} has hidden_size = "
            f"{target.hidden_size}",
        )
    if config.vocab_size != target.vocab_size:
        yield PairProblem(
            "vocabulary",
            f"{config.source}: vocab_size = {config.vocab_size}, but the target {target.model} has {target.vocab_size}",
        )


def check_split(config: DFlashConfig, num_ranks: int) -> None:
    """Whether the draft layers can be split over so many tensor-parallel ranks. Raises ValueError with the sizes.

    Key/value heads may also be fewer than ranks: each is then held by several.
    """
    kv_heads = config.num_key_value_heads
    sizes = {"num_attention_heads": config.num_attention_heads, "intermediate_size": config.intermediate_size}
    uneven = [f"{key} = {size}" for key, size in sizes.items() if size % num_ranks]
    if kv_heads % num_ranks and num_ranks % kv_heads:
        uneven.append(f"num_key_value_heads = {kv_heads}")
    if uneven:
        raise ValueError(
            f"{config.source}: {', '.join(uneven)} cannot be split over the {num_ranks} tensor-parallel ranks: "
            'set --speculative-config\'s "draft_tensor_parallel_size" to 1, so that each holds the whole drafter'
        )


def check_checkpoint(config: DFlashConfig) -> None:
    """Check a local drafter's tensors by their headers, before any engine starts.

    A hub checkpoint is checked when it has been downloaded, by the same rules. Raises ValueError naming the tensor or
    file.
    """
    path = Path(config.source)
    if not path.is_dir() or config.is_quantized or any(path.glob("*.bin")):
        return
    shapes = read_tensor_shapes(path)
    check_tensors(config, shapes)
    check_own_tables(config, shapes)


def check_own_tables(config: DFlashConfig, tensor_names: Mapping[str, Any]) -> None:
    """A drafter of another width than its target cannot borrow the target's embedding and LM head."""
    if config.hidden_size == config.target_hidden_size:
        return
    missing = [name for name in ("embed_tokens.weight", "lm_head.weight") if name not in tensor_names]
    if missing:
        raise ValueError(
            f"{config.source}: hidden_size = {config.hidden_size} differs from the target's "
            f"{config.target_hidden_size}, so the checkpoint must bring its own {' and '.join(missing)}"
        )
