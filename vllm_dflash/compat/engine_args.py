# SPDX-License-Identifier: Apache-2.0
"""Where an engine's speculative config is made: defaults and checks of a DFlash pair, before anything starts.

Patch: `EngineArgs.create_speculative_config`. Reason: vLLM has no default for K with dflash, never reads the drafter's
block size, and checks nothing of the pair. Added: K from the checkpoint, and errors in the user's terms. Removable
when vLLM lets a plugin validate a speculative config.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_dflash.compat import patching
from vllm_dflash.config import DFlashConfig, is_dflash_checkpoint, read_config_dict
from vllm_dflash.validation import (
    DFlashOptions,
    TargetFacts,
    check_checkpoint,
    check_pair,
    resolve_num_speculative_tokens,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
    from vllm.engine.arg_utils import EngineArgs


def install(arg_utils: ModuleType) -> None:
    """Patch `vllm.engine.arg_utils`."""
    patching.replace(arg_utils.EngineArgs, "create_speculative_config", create_speculative_config)


def create_speculative_config(
    self: EngineArgs, target_model_config: ModelConfig, target_parallel_config: ParallelConfig
) -> SpeculativeConfig | None:
    """vLLM's method, with the drafter's defaults filled in and the pair checked. Same signature."""
    from vllm.engine.arg_utils import EngineArgs

    make = patching.original(EngineArgs, "create_speculative_config")
    user = _user_config(self)
    if not _asks_for_dflash(user):
        return make(self, target_model_config, target_parallel_config)
    raw = read_config_dict(user["model"], user.get("revision"))
    if not is_dflash_checkpoint(raw):
        return make(self, target_model_config, target_parallel_config)
    config = DFlashConfig.from_dict(raw, source=str(user["model"]))
    DFlashOptions.from_additional_config(self.additional_config)
    num_speculative_tokens = resolve_num_speculative_tokens(config, user.get("num_speculative_tokens"))
    check_pair(config, _facts(target_model_config))
    check_checkpoint(config)
    if user.get("num_speculative_tokens") is None:
        self.speculative_config = {**(self.speculative_config or {}), "num_speculative_tokens": num_speculative_tokens}
    return make(self, target_model_config, target_parallel_config)


def _user_config(args: EngineArgs) -> dict[str, Any]:
    """What the user asked for, whether by --speculative-config or by the --spec-* flags."""
    user = {key.replace("-", "_"): value for key, value in (args.speculative_config or {}).items()}
    flags = {"method": args.spec_method, "model": args.spec_model, "num_speculative_tokens": args.spec_tokens}
    return user | {key: value for key, value in flags.items() if value is not None}


def _asks_for_dflash(user: dict[str, Any]) -> bool:
    """Explicitly, or, as vLLM infers it, by a drafter whose name says so."""
    model, method = user.get("model"), user.get("method")
    return model is not None and (method == "dflash" or (method is None and "dflash" in str(model).lower()))


def _facts(target: ModelConfig) -> TargetFacts:
    return TargetFacts(
        model=target.model,
        num_hidden_layers=target.get_total_num_hidden_layers(),
        hidden_size=target.get_hidden_size(),
        vocab_size=target.get_vocab_size(),
    )
