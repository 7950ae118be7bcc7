# SPDX-License-Identifier: Apache-2.0
"""Building the draft model inside vLLM: its configuration, its loader, the tables it borrows from the target."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import is_global_first_rank
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import get_draft_load_config, initialize_model
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_dflash.compat.ownership import TreeShape, draft_vocabulary
from vllm_dflash.config import DFlashConfig
from vllm_dflash.logs import logger
from vllm_dflash.model_executor.draft_model import DFlashDraftModel
from vllm_dflash.model_executor.fp8_weights import Fp8RowsMethod
from vllm_dflash.model_executor.reduced_head import reduce_head

#: Backends worth naming to a user; which of them can do it is asked of vLLM.
_COMMON_BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION")


def load_draft_model(vllm_config: VllmConfig, dflash: DFlashConfig, target_model: nn.Module) -> DFlashDraftModel:
    """The drafter with its weights and the target's tables, as the user's options want it. Raises ValueError."""
    model = _load_weights(vllm_config, dflash)
    target = target_model.get_language_model() if hasattr(target_model, "get_language_model") else target_model
    model.share_with_target(target.embed_input_ids, target.lm_head)
    token_ids = draft_vocabulary(vllm_config)
    if token_ids is not None:
        reduce_head(model, token_ids, Fp8RowsMethod() if model.uses_fp8_weights else None)
    return model


def _load_weights(vllm_config: VllmConfig, dflash: DFlashConfig) -> DFlashDraftModel:
    config = draft_vllm_config(vllm_config, dflash)
    check_attention_backend(config)
    loader = get_model_loader(get_draft_load_config(config))

    def create_model(vllm_config: VllmConfig, model_config: Any, prefix: str = "") -> nn.Module:
        return initialize_model(vllm_config, prefix=prefix, model_class=DFlashDraftModel, model_config=model_config)

    # vLLM's registry would answer the checkpoint's architecture name with vLLM's own model.
    loader.create_model = create_model
    try:
        return loader.load_model(config, config.speculative_config.draft_model_config)
    except ValueError as error:
        if "No valid attention backend" not in str(error):
            raise
        raise ValueError(
            f"no attention backend can serve the drafter {dflash.source} with --kv-cache-dtype "
            f"{config.cache_config.cache_dtype}: set --attention-backend to one that does non-causal paged attention "
            f"({', '.join(non_causal_backends())}), or another --kv-cache-dtype. vLLM says: {error}"
        ) from error


def draft_vllm_config(vllm_config: VllmConfig, dflash: DFlashConfig) -> VllmConfig:
    """The engine's config with what differs for the draft layers: causality, attention backend, cache type."""
    speculative = vllm_config.speculative_config
    config = replace(
        vllm_config,
        attention_config=replace(
            vllm_config.attention_config,
            # Chosen anew unless asked for: a backend picked for the target may not fit the drafter.
            backend=speculative.attention_backend,
            use_non_causal=any(not layer.causal for layer in dflash.layers),
        ),
    )
    if speculative.kv_cache_dtype is not None:
        config = replace(config, cache_config=replace(config.cache_config, cache_dtype=speculative.kv_cache_dtype))
    architecture = config.model_config.model_arch_config
    if architecture.is_mm_prefix_lm:  # a trait of the target that rules out backends; the drafter reads text
        config.model_config.model_arch_config = replace(architecture, is_mm_prefix_lm=False)
    return config


def check_attention_backend(config: VllmConfig) -> None:
    """Raise ValueError if the backend asked for cannot let a row see the rows behind it."""
    backend = config.attention_config.backend
    if backend is None or not config.attention_config.use_non_causal or _is_non_causal(backend):
        return
    raise ValueError(
        f"--attention-backend {backend.name} cannot do the non-causal attention of a DFlash block. These can: "
        f"{', '.join(non_causal_backends())}. To change the drafter's alone, set --speculative-config's "
        '"attention_backend"'
    )


def non_causal_backends() -> list[str]:
    """Names of the common backends that can do non-causal paged attention on this machine."""
    return [name for name in _COMMON_BACKENDS if _is_non_causal(AttentionBackendEnum[name])]


def _is_non_causal(backend: AttentionBackendEnum) -> bool:
    try:
        return bool(backend.get_class().supports_non_causal())
    except ImportError:  # its package is not installed
        return False


def announce(dflash: DFlashConfig, runner: str, num_speculative_tokens: int, tree: TreeShape | None = None) -> None:
    """Say once who drafts."""
    if is_global_first_rank():
        logger.info(
            "vllm_dflash: drafting with DFlashProposer (%s runner), %d tokens a block of %d%s, drafter %s",
            runner, num_speculative_tokens, dflash.block_size,
            f", trees of {'up to ' if tree.is_auto else ''}{tree.num_nodes} nodes" if tree else "", dflash.source,
        )  # fmt: skip
