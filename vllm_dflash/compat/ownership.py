# SPDX-License-Identifier: Apache-2.0
"""Which engines are ours. Decided once, where the speculative config is made, and carried to vLLM's other processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from vllm_dflash import __version__
from vllm_dflash.compat.metrics.fallbacks import Fallback

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig, VllmConfig

    from vllm_dflash.config import DFlashConfig

#: Set on the drafter's Hugging Face config, which travels with vLLM's configuration. All are of Python's own types, so
#: that a process without this package can read that configuration, and say what it lacks. The mark is our version.
_MARK = "drafted_by_vllm_dflash"
_VOCABULARY = "vllm_dflash_draft_vocabulary"
_TREE = "vllm_dflash_draft_tree"
_SLOTS = "vllm_dflash_drafting_slots"
_FALLBACKS = "vllm_dflash_startup_fallbacks"
#: For vLLM's cache of compiled graphs alone, which knows the drafter's config and not its tensor parallelism.
_DRAFT_TP = "vllm_dflash_draft_tensor_parallel_size"


class TreeShape(NamedTuple):
    """How large a request's draft tree is."""

    num_nodes: int  # vLLM's num_speculative_tokens
    num_depths: int  # of the drafted block
    num_choices: int  # of a depth that are looked at
    is_auto: bool = False  # how many of the nodes are verified is chosen at every step


def claim(
    speculative: SpeculativeConfig,
    config: DFlashConfig,
    draft_vocabulary: Sequence[int] | None = None,
    num_tree_nodes: int | None = None,
    is_auto: bool = False,
    fallbacks: Sequence[Fallback] = (),
) -> None:
    """Mark an engine's speculative config: this plugin drafts for it, all tokens or those of `draft_vocabulary`,
    chains or trees of `num_tree_nodes`, or, if `is_auto`, of up to so many. `fallbacks`: where it does less than was
    asked for.

    Also says which of the target's layers to tap, where both of vLLM's runners look first, on every pipeline rank.
    """
    hf_config = speculative.draft_model_config.hf_config
    setattr(hf_config, _MARK, __version__)
    setattr(hf_config, _VOCABULARY, None if draft_vocabulary is None else tuple(draft_vocabulary))
    tree = None
    if num_tree_nodes is not None:
        depths = min(num_tree_nodes, config.num_speculative_tokens)
        tree = (num_tree_nodes, depths, min(num_tree_nodes, config.vocab_size), is_auto)
    setattr(hf_config, _TREE, tree)
    setattr(hf_config, _FALLBACKS, tuple(fallback.value for fallback in fallbacks))
    setattr(hf_config, _DRAFT_TP, speculative.draft_tensor_parallel_size)
    hf_config.eagle_aux_hidden_state_layer_ids = config.aux_hidden_state_layer_ids


def drafts_here(vllm_config: VllmConfig) -> bool:
    """Whether this plugin drafts for an engine."""
    return is_ours(vllm_config.speculative_config)


def is_ours(speculative: SpeculativeConfig | None) -> bool:
    """The same, of an engine's speculative config."""
    return claimed_by(speculative) is not None


def claimed_by(speculative: SpeculativeConfig | None) -> str | None:
    """The version of this plugin that has claimed an engine, by its speculative config; None: it is not ours."""
    if speculative is None or speculative.method != "dflash":
        return None
    mark: str | None = getattr(speculative.draft_model_config.hf_config, _MARK, None)
    return mark


def draft_vocabulary(vllm_config: VllmConfig) -> tuple[int, ...] | None:
    """Token ids that an engine of ours may draft, ascending; None: all."""
    chosen: tuple[int, ...] | None = getattr(vllm_config.speculative_config.draft_model_config.hf_config, _VOCABULARY)
    return chosen


def draft_tree(vllm_config: VllmConfig) -> TreeShape | None:
    """The draft trees of an engine; None: chains, or it is none of ours."""
    return tree_shape(vllm_config.speculative_config) if drafts_here(vllm_config) else None


def tree_shape(speculative: SpeculativeConfig) -> TreeShape | None:
    """The same, of an engine's speculative config."""
    shape = getattr(speculative.draft_model_config.hf_config, _TREE)
    return None if shape is None else TreeShape(*shape)


def startup_fallbacks(vllm_config: VllmConfig) -> tuple[Fallback, ...]:
    """What an engine of ours does not do although it was asked for, known before it starts."""
    values: tuple[str, ...] = getattr(vllm_config.speculative_config.draft_model_config.hf_config, _FALLBACKS)
    return tuple(map(Fallback, values))


def plan_drafting_slots(vllm_config: VllmConfig, num_slots: int) -> None:
    """Say what vLLM's scheduler sets aside for drafting, of its tokens of a step, for each request."""
    setattr(vllm_config.speculative_config.draft_model_config.hf_config, _SLOTS, num_slots)


def drafting_slots(speculative: SpeculativeConfig) -> int | None:
    """What was said; None: nothing."""
    model = getattr(speculative, "draft_model_config", None)
    slots: int | None = getattr(getattr(model, "hf_config", None), _SLOTS, None)
    return slots
