# SPDX-License-Identifier: Apache-2.0
"""What vLLM's scheduler sets aside for drafting.

Patch: `SpeculativeConfig.max_num_new_slots_for_drafting`. Reason: for dflash it is a slot for each token that is
verified, so that a step of trees of 63 nodes would hold half as many requests as it has room for. Added: engines of
ours with draft trees say it themselves (`engine_args.py`): nothing, where memory was profiled for a block of every
request. Removable when vLLM asks its speculator.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from vllm_dflash.compat import patching
from vllm_dflash.compat.ownership import drafting_slots

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig

_NAME = "max_num_new_slots_for_drafting"


def install(speculative: ModuleType) -> None:
    """Patch `vllm.config.speculative`."""
    patching.replace(speculative.SpeculativeConfig, _NAME, property(max_num_new_slots_for_drafting))


def max_num_new_slots_for_drafting(self: SpeculativeConfig) -> int:
    """vLLM's property, except where an engine of ours has said otherwise."""
    from vllm.config import SpeculativeConfig

    slots = drafting_slots(self)
    if slots is not None:
        return slots
    number: int = patching.original(SpeculativeConfig, _NAME).fget(self)
    return number
