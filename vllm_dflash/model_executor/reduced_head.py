# SPDX-License-Identifier: Apache-2.0
"""A draft LM head over part of the vocabulary, made from the whole one when the drafter is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

if TYPE_CHECKING:
    from vllm_dflash.model_executor.draft_model import DFlashDraftModel


def reduce_head(model: DFlashDraftModel, token_ids: Sequence[int], method: QuantizeMethodBase | None = None) -> None:
    """Let the drafter draft `token_ids` only, ascending ids of the target; `method` multiplies, by default vLLM's.

    Raises ValueError for a drafter with a vocabulary of its own, and for a quantized LM head.
    """
    option = '--additional-config\'s "dflash": "draft_vocab_size"'
    if model.draft_id_to_target_id is not None:
        size = model.config.draft_vocab_size
        raise ValueError(
            f"{model.config.source} brings a draft vocabulary of its own ({size} tokens): leave out {option}"
        )
    head = model.lm_head
    weight = getattr(head, "weight", None)
    if weight is None or not weight.is_floating_point() or weight.element_size() < 2:
        kind = type(getattr(head, "quant_method", head)).__name__
        raise ValueError(f"{option} needs an LM head of plain weights, and this one is quantized ({kind})")
    ids = torch.tensor(token_ids, dtype=torch.int64, device=weight.device)
    with set_current_vllm_config(model.vllm_config), torch.device(weight.device):
        reduced = ParallelLMHead(
            len(token_ids), weight.shape[1], bias=getattr(head, "bias", None) is not None, params_dtype=weight.dtype
        )
        logits_processor = LogitsProcessor(len(token_ids))
    for name in ("weight", "bias"):
        parameter = getattr(reduced, name, None)
        if parameter is not None:
            reduced.weight_loader(parameter, _rows(head, getattr(head, name).data, ids))
    reduced.quant_method = method or reduced.quant_method
    reduced.quant_method.process_weights_after_loading(reduced)
    model.lm_head, model.logits_processor, model.draft_id_to_target_id = reduced, logits_processor, ids


def _rows(
    head: nn.Module,
    shard: torch.Tensor,  # [rows of this rank, ...] of the head's weight or bias
    ids: torch.Tensor,  # [V'] rows of the whole
) -> torch.Tensor:
    """Rows `ids` of a head that tensor-parallel ranks share, [V', ...], on every rank."""
    start, end = head.shard_indices.org_vocab_start_index, head.shard_indices.org_vocab_end_index
    here = (ids >= start) & (ids < end)
    rows = shard[torch.where(here, ids - start, 0)]
    rows = torch.where(here.view(-1, *[1] * (rows.ndim - 1)), rows, 0)
    return tensor_model_parallel_all_reduce(rows) if get_tensor_model_parallel_world_size() > 1 else rows
