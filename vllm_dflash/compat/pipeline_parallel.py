# SPDX-License-Identifier: Apache-2.0
"""The target's embedding on a pipeline rank that has none.

The drafter lives on the last rank, where vLLM relays the tapped hidden states to, and the embedding on the first.
"""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.models.utils import PPMissingLayer

from vllm_dflash.logs import logger

_TABLE = "embed_tokens.weight"


def ensure_embedding(target: nn.Module, vllm_config: VllmConfig) -> None:
    """Load the embedding into a target's last stage if it is missing there, so that `embed_input_ids` works.

    Raises ValueError where the loader cannot read single tensors, or the checkpoint has no such table.
    """
    inner = getattr(target, "model", target)
    if not isinstance(getattr(inner, "embed_tokens", None), PPMissingLayer):
        return
    loader, config = get_model_loader(vllm_config.load_config), vllm_config.model_config
    if not hasattr(loader, "get_all_weights"):
        size, load_format = vllm_config.parallel_config.pipeline_parallel_size, vllm_config.load_config.load_format
        raise ValueError(
            f"--pipeline-parallel-size {size}: the drafter needs the target's embedding on the last rank, and "
            f"--load-format {load_format} cannot load it alone"
        )
    table = next((tensor for name, tensor in loader.get_all_weights(config, target) if name.endswith(_TABLE)), None)
    if table is None:
        raise ValueError(f"{config.model}: its checkpoint has no {_TABLE}, which the drafter needs on the last rank")
    lm_head = target.lm_head.weight
    with set_current_vllm_config(vllm_config), torch.device(lm_head.device):
        embedding = VocabParallelEmbedding(*table.shape, params_dtype=config.dtype)
    embedding.weight_loader(embedding.weight, table)
    inner.embed_tokens = embedding
    logger.info("vllm_dflash: loaded the target's embedding once more, for the drafter on the last pipeline rank")
