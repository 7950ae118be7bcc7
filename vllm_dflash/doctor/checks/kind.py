# SPDX-License-Identifier: Apache-2.0
"""What kind of drafter it is, and the keys of its config.json that cannot be used."""

from __future__ import annotations

import re
from collections.abc import Iterator

from vllm_dflash.config import UNSUPPORTED_KEYS, is_dflash_checkpoint
from vllm_dflash.doctor.facts import Drafter, Facts, bare_key
from vllm_dflash.doctor.finding import Finding, error, info, ok, warning

#: Successors of DFlash that vLLM has implementations of its own for.
_SUCCESSORS = re.compile(r"DFlash2|LiLiCorr|DSpark", re.IGNORECASE)

_ID_OF_KEY = {
    "aux_hidden_state_layer_ids": "target-layers",
    "block_size": "block-size",
    "draft_vocab_size": "vocabulary",
    "hidden_size": "hidden-size",
    "layer_types": "sliding-window",
    "mask_token_id": "mask-token",
    "num_target_layers": "target-depth",
    "rope_parameters": "rope",
    "sliding_window": "sliding-window",
    "target_hidden_size": "hidden-size",
    "target_layer_ids": "target-layers",
    "use_sliding_window": "sliding-window",
    "vocab_size": "vocabulary",
} | dict.fromkeys(UNSUPPORTED_KEYS, "drafter-kind")

_CHANGES = {
    "block-size": "set block_size to what the drafter was trained with: anchor and masks",
    "mask-token": "set dflash_config.mask_token_id to the id that the drafter was trained with",
    "sliding-window": "make layer_types, sliding_window and use_sliding_window say the same, as in training",
    "target-layers": "set dflash_config.target_layer_ids as in training: i is the output of decoder layer i, from 0",
    "drafter-kind": "use vLLM's own implementation (VLLM_DFLASH=0), or a drafter without this part",
}
_CHANGE = "take the config.json that came with the drafter, or correct this key"


def architecture_names(drafter: Drafter) -> str:
    """What the drafter calls itself."""
    names = drafter.raw.get("architectures")
    told = [str(name) for name in names] if isinstance(names, list) else []
    kind = drafter.raw.get("speculators_model_type")
    return ", ".join(told + ([f"speculators: {kind}"] if kind else []))


def check_kind(facts: Facts) -> Iterator[Finding]:
    """Who drafts with this checkpoint: this plugin, vLLM's own implementations, or nobody."""
    id, drafter = "drafter-kind", facts.drafter
    names = architecture_names(drafter)
    if is_dflash_checkpoint(drafter.raw):
        yield ok(id, f"a plain DFlash drafter ({names})")
    elif _SUCCESSORS.search(names):
        yield warning(
            id,
            f"{names}: not a plain DFlash drafter, vllm_dflash stands aside and vLLM's own implementation drafts",
            "serve it with vLLM's V2 model runner, which has it; options of vllm_dflash have no effect",
        )
    elif "dflash" in names.lower():
        yield warning(
            id,
            f"{names}: a DFlash drafter with parts that only vLLM's own implementation has; vllm_dflash stands aside",
            "serve it as it is; options of vllm_dflash have no effect",
        )
    else:
        yield error(
            id,
            f"not a DFlash drafter: its config.json says architectures = {drafter.raw.get('architectures')!r}",
            "--draft must name a DFlash drafter; is it the target?",
        )


def check_config_keys(facts: Facts) -> Iterator[Finding]:
    """Every key of the drafter's config.json that cannot be used."""
    drafter = facts.drafter
    if not is_dflash_checkpoint(drafter.raw):
        yield info("drafter-config", "only what plain DFlash drafters have too was checked of this drafter's parts")
        return
    for problem in drafter.config_errors:
        name = bare_key(problem.key)
        id = _ID_OF_KEY.get(name, "drafter-config")
        yield error(id, str(problem), _CHANGES.get(id, _CHANGE))
    for message in drafter.other_errors:
        yield error("drafter-config", message, _CHANGE)
