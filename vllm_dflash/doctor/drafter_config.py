# SPDX-License-Identifier: Apache-2.0
"""Reads a drafter's config.json past its first error, so that one bad key does not hide the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_dflash.config import ConfigKeyError, DFlashConfig, published_layout
from vllm_dflash.doctor.facts import bare_key

#: More keys than that are never at fault: a guard, so that nothing goes round for ever.
_MOST_ERRORS = 50
#: Of a shape that a drafter needs: numbers that stand in for one that cannot be read.
_STAND_INS = {"block_size": 16, "num_attention_heads": 1, "intermediate_size": 1}
_ROPE = ("rope_parameters", "rope_scaling")


class ReadConfig:
    """A config.json as far as it can be read. Its fields are those of `facts.Drafter`."""

    def __init__(self, raw: Mapping[str, Any], source: str, of_target: Mapping[str, Any]) -> None:
        """of_target: the target's decoder config, whose numbers stand in for unreadable ones of the drafter."""
        self.source, self.of_target = source, of_target
        self.config_errors: list[ConfigKeyError] = []
        self.other_errors: list[str] = []
        self.config: DFlashConfig | None = None
        self.flat: dict[str, Any] = self._flattened(dict(raw))
        self._parse(dict(self.flat))

    def _flattened(self, raw: dict[str, Any]) -> dict[str, Any]:
        try:
            return published_layout(raw, self.source)
        except ConfigKeyError as error:
            self.config_errors.append(error)
            return published_layout(raw | {"aux_hidden_state_layer_ids": None}, self.source)
        except ValueError as error:
            self.other_errors.append(str(error))
            return raw

    def _parse(self, flat: dict[str, Any]) -> None:
        known = {error.key for error in self.config_errors}
        for _ in range(_MOST_ERRORS):
            try:
                self.config = DFlashConfig.from_dict(flat, source=self.source)
                return
            except ConfigKeyError as error:
                repeats = error.key in known
                # Layer ids in the layout of speculators have a name of their own, and were complained about already.
                follows = error.key == "dflash_config.target_layer_ids" and "aux_hidden_state_layer_ids" in known
                if not (repeats or follows):
                    self.config_errors.append(error)
                if repeats:
                    return
                known.add(error.key)
                flat = self._without(flat, error.key)
            except (TypeError, ValueError, AttributeError) as error:
                self.other_errors.append(f"{self.source}: config.json cannot be read: {error}")
                return

    def _without(self, flat: dict[str, Any], key: str) -> dict[str, Any]:
        """The config with a stand-in for what cannot be read: the target's value, which raises no other complaint."""
        nested = flat.get("dflash_config")
        dflash = dict(nested) if isinstance(nested, Mapping) else {}
        name = bare_key(key)
        flat = {other: value for other, value in flat.items() if other != name}
        dflash.pop(name, None)
        if name == "mask_token_id":
            dflash[name] = 0
        elif name == "target_layer_ids":
            dflash[name] = [0]
        elif name == "sliding_window":
            dflash.pop("swa_window_size", None)
            flat[name] = self.of_target.get("max_position_embeddings") or 1
        elif name == "num_hidden_layers":
            flat[name] = len(flat.get("layer_types") or [1])
        elif name in _ROPE:
            flat = {other: value for other, value in flat.items() if other not in _ROPE}
        elif name in _STAND_INS or name in ("hidden_size", "vocab_size"):
            flat[name] = _STAND_INS.get(name) or self.of_target.get(name) or 1
        return flat | {"dflash_config": dflash}
