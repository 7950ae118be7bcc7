# SPDX-License-Identifier: Apache-2.0
"""vLLM's own idea of what the V1 runner's dflash can do.

Patch: `VllmConfig._dflash_needs_multi_kv_group`. Reason: vLLM refuses drafters that mix sliding and full layers on the
V1 runner, because its own proposer knows one KV-cache group there. Added: such drafters run on V1 too, since this
plugin's adapter serves several groups. Removable when vLLM's check asks the proposer.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from vllm_dflash.compat import patching
from vllm_dflash.compat.ownership import drafts_here

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def install(config: ModuleType) -> None:
    """Patch `vllm.config.vllm`."""
    patching.replace(config.VllmConfig, "_dflash_needs_multi_kv_group", needs_multi_kv_group)


def needs_multi_kv_group(self: VllmConfig) -> bool:
    """vLLM's method, except that an engine of ours never needs another runner for it. Same signature."""
    from vllm.config import VllmConfig

    return not drafts_here(self) and patching.original(VllmConfig, "_dflash_needs_multi_kv_group")(self)
