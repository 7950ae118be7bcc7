# SPDX-License-Identifier: Apache-2.0
"""Rotary positions. The drafter reads the target's states at the target's positions, so both mostly rotate alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_dflash.doctor.facts import Facts, Target
from vllm_dflash.doctor.finding import Finding, info, ok, warning

_KEYS = ("rope_parameters", "rope_scaling")
_CHANGE = (
    "unless it was trained so, set the drafter's {} to the target's: a mismatch raises nothing, drafts are just wrong"
)
#: Not about how positions are scaled.
_NO_SCALING = ("rope_theta", "partial_rotary_factor", "type", "rope_type")


def check_rope(facts: Facts) -> Iterator[Finding]:
    """theta, scaling and partial factor against the target's."""
    if facts.drafter.config is None or not facts.drafter.can_read(*_KEYS):
        return
    mine, theirs = dict(facts.drafter.config.rope_parameters), target_rope(facts.target)
    found = [*_theta(mine, theirs, _states_theta(facts)), *_partial(mine, theirs), *_scaling(mine, theirs)]
    yield from found
    if not found:
        yield ok("rope", f"theta {_plain(mine['rope_theta'])}, {mine['rope_type']}, as the target's")


def _plain(theta: Any) -> str:
    """1000000.0 as 1000000."""
    return str(int(theta)) if isinstance(theta, float) and theta.is_integer() else str(theta)


def target_rope(target: Target) -> dict[str, Any]:
    """The target's RoPE in one dict; `rope_theta` is absent where its config.json does not tell it."""
    rope: Any = next((target.text[key] for key in _KEYS if isinstance(target.text.get(key), Mapping)), {})
    if any(isinstance(value, Mapping) for value in rope.values()):  # one for each kind of layer
        rope = rope.get("full_attention") or {}
    found = dict(rope)
    for key in ("rope_theta", "partial_rotary_factor"):
        value = target.text.get(key) if found.get(key) is None else found[key]
        found.pop(key, None)
        if isinstance(value, int | float):
            found[key] = value
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    if found["rope_type"] == "mrope":  # several positions a token, alike for text
        found["rope_type"] = "default"
    return found


def _states_theta(facts: Facts) -> bool:
    flat = facts.drafter.flat
    return "rope_theta" in flat or any("rope_theta" in (flat.get(key) or {}) for key in _KEYS)


def _theta(mine: Mapping[str, Any], theirs: Mapping[str, Any], is_stated: bool) -> Iterator[Finding]:
    own, other = mine["rope_theta"], theirs.get("rope_theta")
    if other is None:
        yield info("rope-theta", f"theta {_plain(own)}; the target's config.json tells none to compare with")
    elif own != other:
        told = "" if is_stated else " (its config.json tells none)"
        yield warning(
            "rope-theta",
            f"the drafter's rope_theta is {_plain(own)}{told}, the target's {_plain(other)}",
            _CHANGE.format("rope_theta"),
        )


def _partial(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Finding]:
    own, other = mine.get("partial_rotary_factor"), theirs.get("partial_rotary_factor")
    if (own or 1.0) == (other or 1.0):
        return
    if own is None:
        yield info(
            "rope-partial",
            f"the target rotates {other:.0%} of a head's channels, the drafter all: usual where its heads are its own",
            "if acceptance is low, compare with partial_rotary_factor in the config that the drafter was trained with",
        )
    else:
        yield warning(
            "rope-partial",
            f"the drafter's partial_rotary_factor is {own:g}, the target's {other or 1.0:g}",
            _CHANGE.format("partial_rotary_factor"),
        )


def _scaling(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Finding]:
    own, other = (
        {"rope_type": rope["rope_type"]}
        | {key: value for key, value in rope.items() if key not in _NO_SCALING and not key.startswith("mrope")}
        for rope in (mine, theirs)
    )
    if own["rope_type"] == other["rope_type"] == "default" or own == other:
        return
    yield warning(
        "rope-scaling",
        f"the drafter's RoPE is scaled by {own}, the target's by {other}",
        _CHANGE.format("rope_parameters (rope_scaling)"),
    )
