# SPDX-License-Identifier: Apache-2.0
"""Checkpoint tensors -> the draft model's parameters. Strict: nothing missing, nothing ignored in silence."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.transformers_utils.repo_utils import get_hf_file_bytes

from vllm_dflash.checkpoint import IGNORED_TENSORS, MASK_EMBEDDING_FILE, check_tensors, parse_mask_embedding
from vllm_dflash.validation import check_own_tables

if TYPE_CHECKING:
    from vllm_dflash.model_executor.draft_model import DFlashDraftModel

#: checkpoint name -> (vLLM's stacked parameter, which part of it)
_STACKED: dict[str, tuple[str, str | int]] = {
    ".q_proj.": (".qkv_proj.", "q"),
    ".k_proj.": (".qkv_proj.", "k"),
    ".v_proj.": (".qkv_proj.", "v"),
    ".gate_proj.": (".gate_up_proj.", 0),
    ".up_proj.": (".gate_up_proj.", 1),
}


def load_draft_weights(model: DFlashDraftModel, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Load every tensor of a drafter checkpoint; returns the names of the parameters that were filled."""
    tensors = dict(weights)
    if not model.config.is_quantized:  # packed weights have names and shapes of their own
        check_tensors(model.config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        check_own_tables(model.config, tensors)
    _make_own_tables(model, tensors)
    parameters = dict(model.named_parameters())
    loaded = {_load_one(parameters, name, tensor) for name, tensor in tensors.items() if not _is_special(name)}
    model.context_kv.gather_weights([attention.k_norm for attention in model.attentions])
    loaded |= {name for name in parameters if name.startswith("context_kv.kv_proj.")}
    _load_mask_embedding(model)
    return loaded


def _is_special(name: str) -> bool:
    return name == "d2t" or name.endswith(IGNORED_TENSORS)


def _make_own_tables(model: DFlashDraftModel, tensors: dict[str, torch.Tensor]) -> None:
    """Create what the checkpoint brings of its own; what it lacks is the target's and costs no memory here."""
    device, dtype = model.backbone.norm.weight.device, model.backbone.norm.weight.dtype
    with set_current_vllm_config(model.vllm_config), torch.device(device):
        if "embed_tokens.weight" in tensors:
            model.embed_tokens = model.new_embedding().to(dtype)
        if "lm_head.weight" in tensors:
            model.lm_head = model.new_lm_head().to(dtype)
    if "d2t" in tensors:
        offsets = tensors["d2t"].to(device)
        model.draft_id_to_target_id = torch.arange(len(offsets), device=device) + offsets


def _load_one(parameters: dict[str, nn.Parameter], name: str, tensor: torch.Tensor) -> str:
    shard: str | int | None = None
    for part, (stacked, shard_id) in _STACKED.items():
        if part in name:
            name, shard = name.replace(part, stacked), shard_id
            break
    if name.startswith(("layers.", "norm.")):
        name = f"backbone.{name}"
    elif name.startswith(("fc.", "hidden_norm.")):
        name = f"context_kv.{name}"
    if name not in parameters:
        raise ValueError(f"the drafter has no parameter {name!r} for a tensor of its checkpoint")
    parameter = parameters[name]
    loader = getattr(parameter, "weight_loader", default_weight_loader)
    loader(parameter, tensor) if shard is None else loader(parameter, tensor, shard)
    return name


def _load_mask_embedding(model: DFlashDraftModel) -> None:
    """Some checkpoints train the mask token's embedding apart and ship it beside the safetensors."""
    draft_config = model.vllm_config.speculative_config.draft_model_config
    data = get_hf_file_bytes(MASK_EMBEDDING_FILE, draft_config.model, draft_config.revision)
    if data is not None:
        embedding = parse_mask_embedding(io.BytesIO(data), f"{draft_config.model}/{MASK_EMBEDDING_FILE}", model.config)
        weight = model.backbone.norm.weight
        model.mask_embedding = embedding.to(weight.device, weight.dtype)
