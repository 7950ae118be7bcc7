# SPDX-License-Identifier: Apache-2.0
"""The shape of Qwen3-8B with a drafter of five layers, for random weights."""

from __future__ import annotations

import json
from pathlib import Path

MASK_BLOCK = 16
SHAPE = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000, "rope_scaling": None, "hidden_act": "silu", "attention_bias": False,
    "attention_dropout": 0.0, "initializer_range": 0.02, "tie_word_embeddings": False, "use_cache": True,
    "use_sliding_window": False, "sliding_window": None, "torch_dtype": "bfloat16", "model_type": "qwen3",
    "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
TARGET = SHAPE | {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 36, "max_window_layers": 36}
DRAFTER = SHAPE | {
    "architectures": ["DFlashDraftModel"],
    "num_hidden_layers": 5,
    "max_window_layers": 5,
    "layer_types": ["full_attention"] * 5,
    "block_size": MASK_BLOCK,
    "num_target_layers": 36,
    "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
}


def write_shape(folder: Path) -> None:
    """Write target/config.json and drafter/config.json there."""
    for name, config in (("target", TARGET), ("drafter", DRAFTER)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
