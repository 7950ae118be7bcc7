# SPDX-License-Identifier: Apache-2.0
"""The config of a new drafter: as wide as its target, as deep as the recipe says, in the published layout."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Qwen3Config

from vllm_dflash.config import DFlashConfig
from vllm_dflash.training.recipe import ModelRecipe

#: Parts of a target's RoPE that are about its own heads.
_OF_THE_TARGET_ALONE = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")


def new_drafter_config(target: nn.Module, model: ModelRecipe, mask_token_id: int) -> Qwen3Config:
    """A Qwen3-style stack over the target's hidden states (paper, section 3).

    Raises ValueError naming the recipe's key where the target has no such layer, or too few for the default taps.
    """
    of_target = target.config.get_text_config(decoder=True)
    fields = _width(of_target) | {
        "architectures": ["DFlashDraftModel"],
        "vocab_size": target.get_input_embeddings().num_embeddings,
        "intermediate_size": model.intermediate_size or of_target.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "rope_parameters": _rope(of_target),
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": of_target.eos_token_id,
        "dtype": "bfloat16",
        "block_size": model.block_size,
        "num_target_layers": of_target.num_hidden_layers,
    }
    if model.sliding_window is not None:
        fields |= {
            "layer_types": ["sliding_attention"] * model.num_layers,
            "sliding_window": model.sliding_window,
            "use_sliding_window": True,
        }
    if model.draft_vocab_size is not None:
        fields |= {"draft_vocab_size": model.draft_vocab_size, "own_tensors": ["d2t", "lm_head.weight"]}
    dflash: dict[str, Any] = {"mask_token_id": mask_token_id, "causal": False}
    dflash["target_layer_ids"] = _layer_ids(model, of_target.num_hidden_layers, fields | {"dflash_config": dflash})
    return Qwen3Config(**fields, dflash_config=dflash)


def _width(of_target: Any) -> dict[str, Any]:
    num_heads = of_target.num_attention_heads
    return {
        "hidden_size": of_target.hidden_size,
        "num_attention_heads": num_heads,
        "num_key_value_heads": getattr(of_target, "num_key_value_heads", None) or num_heads,
        "head_dim": getattr(of_target, "head_dim", None) or of_target.hidden_size // num_heads,
        "max_position_embeddings": of_target.max_position_embeddings,
        "rms_norm_eps": getattr(of_target, "rms_norm_eps", 1e-6),
    }


def _rope(of_target: Any) -> dict[str, Any]:
    found = dict(getattr(of_target, "rope_parameters", None) or {})
    if "rope_theta" not in found:  # none, or one for each kind of layer
        return {"rope_type": "default", "rope_theta": 10_000.0}
    return {"rope_type": "default"} | {key: value for key, value in found.items() if key not in _OF_THE_TARGET_ALONE}


def _layer_ids(model: ModelRecipe, depth: int, fields: dict[str, Any]) -> list[int]:
    if model.target_layer_ids is not None:
        if model.target_layer_ids[-1] >= depth:
            raise ValueError(
                f"model.target_layer_ids: {list(model.target_layer_ids)} reach beyond the target's {depth} decoder "
                f"layers, 0 to {depth - 1}"
            )
        return list(model.target_layer_ids)
    try:
        return list(DFlashConfig.from_dict(fields, source="the new drafter").target_layer_ids)
    except ValueError as error:
        raise ValueError(f"name the tapped layers in the recipe's model.target_layer_ids: {error}") from error
