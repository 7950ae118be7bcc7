# SPDX-License-Identifier: Apache-2.0
"""A toy target and toy drafters of many shapes, written in the published layouts with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCAB, HIDDEN, TARGET_LAYERS, BLOCK, MASK = 512, 64, 6, 8, 511

TARGET_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": VOCAB, "hidden_size": HIDDEN,
    "intermediate_size": 96, "num_hidden_layers": TARGET_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
    "attention_bias": False, "tie_word_embeddings": True, "torch_dtype": "float32",
}  # fmt: skip

DRAFT_CONFIG = {
    "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "vocab_size": VOCAB, "hidden_size": HIDDEN,
    "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
    "attention_bias": False, "tie_word_embeddings": False, "torch_dtype": "float32", "block_size": BLOCK,
    "num_target_layers": TARGET_LAYERS, "dflash_config": {"mask_token_id": MASK, "target_layer_ids": [1, 2, 4]},
}  # fmt: skip


def write_target(folder: Path) -> Path:
    """A random Qwen3 target whose greedy text does not repeat itself at once."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(11)
    keys = {k: v for k, v in TARGET_CONFIG.items() if k not in ("architectures", "model_type", "torch_dtype")}
    Qwen3ForCausalLM(Qwen3Config(**keys, initializer_range=0.15)).save_pretrained(folder)
    return folder


def published_tensors(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Random tensors under the published names. k_norm weights differ widely between layers and channels."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * 0.15

    def near_one(size: int) -> torch.Tensor:
        return 1 + 0.2 * torch.randn(size, generator=generator)

    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_rows, kv_rows = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    taps = len(config["dflash_config"].get("target_layer_ids", DEFAULT_TAPS))
    tensors = {
        "fc.weight": matrix(hidden, taps * hidden),
        "hidden_norm.weight": near_one(hidden),
        "norm.weight": near_one(hidden),
    }
    for index in range(config["num_hidden_layers"]):
        rows = {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows, "o_proj": hidden}
        for name, count in rows.items():
            columns = q_rows if name == "o_proj" else hidden
            tensors[f"layers.{index}.self_attn.{name}.weight"] = matrix(count, columns)
            if config["attention_bias"]:
                tensors[f"layers.{index}.self_attn.{name}.bias"] = matrix(count, 1)[:, 0] * 3
        tensors |= {
            f"layers.{index}.self_attn.q_norm.weight": near_one(head_dim),
            f"layers.{index}.self_attn.k_norm.weight": torch.rand(head_dim, generator=generator) * 4.0 ** (index + 1),
            f"layers.{index}.mlp.gate_proj.weight": matrix(inner, hidden),
            f"layers.{index}.mlp.up_proj.weight": matrix(inner, hidden),
            f"layers.{index}.mlp.down_proj.weight": matrix(hidden, inner),
            f"layers.{index}.input_layernorm.weight": near_one(hidden),
            f"layers.{index}.post_attention_layernorm.weight": near_one(hidden),
        }
    return tensors


def write_drafter(folder: Path, variant: str) -> Path:
    """One of VARIANTS, as a checkpoint directory."""
    folder.mkdir(parents=True)
    config = DRAFT_CONFIG | VARIANTS[variant]
    tensors = published_tensors(config, seed=len(variant))
    if variant == "reduced_vocabulary":
        generator = torch.Generator().manual_seed(3)
        kept = torch.randperm(VOCAB - 1, generator=generator)[: config["draft_vocab_size"]].sort().values
        tensors["d2t"] = kept - torch.arange(len(kept))
        tensors["lm_head.weight"] = torch.randn(len(kept), HIDDEN, generator=generator) * 0.15
        tensors["embed_tokens.weight"] = torch.randn(VOCAB, HIDDEN, generator=generator) * 0.15
        embedding = torch.randn(HIDDEN, generator=generator)
        torch.save({"mask_token_id": MASK, "embedding": embedding}, folder / "mask_embedding.pt")
    if variant == "speculators_layout":
        config = speculators_config(config)
    write_shards(folder, tensors, 2 if variant == "bias_partial_rotary" else 1)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], count: int) -> None:
    """One model.safetensors, or several with their index."""
    names = sorted(tensors)
    files = ["model.safetensors"] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(count)]
    for number, file in enumerate(files):
        save_file({name: tensors[name].contiguous() for name in names[number::count]}, folder / file, {"format": "pt"})
    if count > 1:
        weight_map = {name: files[index % count] for index, name in enumerate(names)}
        index_file = folder / "model.safetensors.index.json"
        index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def speculators_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same drafter as the speculators library writes it: layer ids count the embedding as 0."""
    inner = {k: v for k, v in config.items() if k not in ("architectures", "block_size", "dflash_config")}
    return {
        "speculators_model_type": "dflash",
        "architectures": ["DFlashSpeculator"],
        "transformer_layer_config": inner,
        "block_size": config["block_size"],
        "mask_token_id": MASK,
        "aux_hidden_state_layer_ids": [i + 1 for i in config["dflash_config"]["target_layer_ids"]],
        "speculators_config": {
            "algorithm": "dflash",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": config["block_size"] - 1}],
            "verifier": {"name_or_path": "toy", "architectures": ["Qwen3ForCausalLM"]},
        },
    }


#: Where a checkpoint names no layers: one tap per draft layer, from the 2nd to the 3rd-to-last of 6 layers.
DEFAULT_TAPS = [1, 3]

#: What differs from DRAFT_CONFIG.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias_partial_rotary": {
        "attention_bias": True, "num_attention_heads": 6, "num_key_value_heads": 1, "intermediate_size": 64,
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    },
    "sliding_and_full": {
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32, "use_sliding_window": True,
        "max_window_layers": 0,
    },
    "all_sliding": {
        "layer_types": ["sliding_attention"] * 2, "sliding_window": 40, "use_sliding_window": True,
        "max_window_layers": 0, "is_causal": False,
    },
    "reduced_vocabulary": {"draft_vocab_size": 160},
    "speculators_layout": {},
    "default_taps": {"dflash_config": {"mask_token_id": MASK}},
    "scaled_rope": {
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 64},
    },
}  # fmt: skip
