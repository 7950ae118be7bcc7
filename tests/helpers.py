# SPDX-License-Identifier: Apache-2.0
"""Tiny drafters and targets for tests: their raw configs, models and checkpoint directories.

Sizes are all different from each other, so that a mix-up of two of them shows. Torch is only imported where tensors
are made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

    from vllm_dflash.hf import DFlashDraftModel
    from vllm_dflash.tree import DraftTree

#: As a value of a change: leave this key out.
ABSENT = object()

_DRAFTER = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "block_size": 16,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 96,
    "num_target_layers": 6,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "dflash_config": {"mask_token_id": 95, "target_layer_ids": [1, 3]},
}

_TARGET = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

#: Keys that speculators writes at the top level; all other keys of a drafter stand in transformer_layer_config.
_SPECULATORS_TOP_LEVEL = ("block_size", "draft_vocab_size", "target_hidden_size")


def drafter_config(**changes: Any) -> dict[str, Any]:
    """The raw config.json of a drafter for `target_config()`, published layout. `dflash_config` is merged by key."""
    dflash = _merged(_DRAFTER["dflash_config"], changes.pop("dflash_config", {}))
    return _merged(_DRAFTER, changes) | {"dflash_config": dflash}


def speculators_config(**changes: Any) -> dict[str, Any]:
    """The same drafter as `drafter_config()` in the layout of speculators. `transformer_layer_config` is merged."""
    layer_config = {
        key: value
        for key, value in _DRAFTER.items()
        if key not in ("architectures", "dflash_config", "num_target_layers", *_SPECULATORS_TOP_LEVEL)
    }
    raw = {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": "dflash",
        "block_size": 16,
        "draft_vocab_size": 96,
        "mask_token_id": 95,
        "aux_hidden_state_layer_ids": [2, 4],
        "transformer_layer_config": _merged(layer_config, changes.pop("transformer_layer_config", {})),
        "speculators_config": {
            "algorithm": "dflash",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 15}],
            "verifier": {"architectures": ["Qwen3ForCausalLM"], "name_or_path": "target"},
        },
    }
    return _merged(raw, changes)


def target_config(**changes: Any) -> dict[str, Any]:
    """The raw config.json of a small Qwen3 target."""
    return _merged(_TARGET, changes)


def write_config(directory: Path, raw: Any) -> Path:
    """Write `raw` as the config.json of a directory, which is made if need be. Returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return directory


def write_tensors(directory: Path, shapes: Mapping[str, tuple[int, ...]], num_shards: int = 1) -> Path:
    """Write tensors of zeros, dealt out over safetensors shards. Returns the directory."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    names = sorted(shapes)
    for shard in range(num_shards):
        file = directory / f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file({name: torch.zeros(shapes[name]) for name in names[shard::num_shards]}, file)
    return directory


def truncate(file: Path) -> None:
    """Cut a file in half, as a broken download does."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def drafter(seed: int = 0, **changes: Any) -> DFlashDraftModel:
    """A drafter with random weights, norms and biases included. Changes as for `drafter_config`."""
    from transformers import Qwen3Config

    from vllm_dflash.hf import DFlashDraftModel

    model = DFlashDraftModel(Qwen3Config(**drafter_config(**changes)))
    randomise(model, seed)
    return model.eval()


def write_drafter(directory: Path, **changes: Any) -> Path:
    """A whole drafter checkpoint with random weights. Changes as for `drafter_config`. Returns the directory."""
    drafter(**changes).save_pretrained(directory)
    return directory


def target(seed: int = 0, **changes: Any) -> Qwen3ForCausalLM:
    """A Qwen3 target with random weights, fp32. Changes as for `target_config`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(Qwen3Config(**target_config(**changes)))
    randomise(model, seed)
    return model.eval()


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (dict(base) | dict(changes)).items() if value is not ABSENT}


def randomise(model: Any, seed: int = 0) -> Any:
    """Weights whose influence on the output is large everywhere: a part left out must show. Returns the model."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.copy_(2.0 + 0.6 * noise)  # sharp attention: which row a query finds decides the output
            elif name.endswith("norm.weight"):
                parameter.copy_(1.0 + 0.3 * noise)
            else:
                parameter.copy_(noise * (parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.5))
    return model


def planted_tree(right: list[list[int]], decoys: bool) -> DraftTree:
    """Every row's right tokens one below the other, behind decoys if asked: [wrong, right], [wrong, right], ..."""
    import torch

    from vllm_dflash.tree import DraftTree

    tokens, parents, depths = [], [], []
    for row in right:
        nodes: list[tuple[int, int, int]] = []
        parent = -1
        for depth, token in enumerate(row, start=1):
            if decoys:
                nodes.append(((token + 1) % _TARGET["vocab_size"], parent, depth))
            nodes.append((token, parent, depth))
            parent = len(nodes) - 1
        for column, values in zip((tokens, parents, depths), zip(*nodes, strict=True), strict=True):
            column.append(list(values))
    columns = [torch.tensor(column) for column in (tokens, parents, depths)]
    return DraftTree(*columns, torch.zeros(columns[0].shape), torch.ones(columns[0].shape, dtype=torch.bool))
