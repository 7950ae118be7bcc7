# SPDX-License-Identifier: Apache-2.0
"""What is known of the installed vLLM without starting it. compat/ finds it out, the doctor reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EngineFacts:
    """vLLM as far as a pair is concerned.

    version: of the installed vLLM; None: there is none.
    supported: the release that this plugin fits; is_supported: whether the installed one is.
    is_switched_off: whether the environment tells the plugin to stand aside.
    knows_target: whether vLLM lists the target's architecture; None: could not be told.
    taps_target: whether its model class hands out hidden states of its layers; None: could not be told.
    kv_cache_dtypes: by attention backend that can do a DFlash block's non-causal attention, what its cache may hold.
    """

    version: str | None = None
    supported: str = ""
    is_supported: bool = False
    is_switched_off: bool = False
    knows_target: bool | None = None
    taps_target: bool | None = None
    kv_cache_dtypes: Mapping[str, frozenset[str]] = field(default_factory=dict)
