# SPDX-License-Identifier: Apache-2.0
"""The installed vLLM, and what it can do with the target."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_dflash.doctor.facts import Facts
from vllm_dflash.doctor.finding import Finding, error, info, ok, warning


def check_version(facts: Facts) -> Iterator[Finding]:
    """Whether this plugin drafts in the installed vLLM."""
    engine = facts.engine
    if engine.version is None:
        yield info("vllm-version", "vLLM is not installed here, so nothing is known of it", "")
    elif not engine.is_supported:
        yield warning(
            "vllm-version",
            f"vLLM {engine.version} is installed, and vllm_dflash is for {engine.supported}: it stands aside there",
            f"install vLLM {engine.supported}; until then vLLM's own dflash drafts",
        )
    elif engine.is_switched_off:
        yield info(
            "vllm-version",
            f"vLLM {engine.version}, but VLLM_DFLASH=0 is set: vllm_dflash stands aside",
            "unset VLLM_DFLASH to draft with it",
        )
    else:
        yield ok("vllm-version", f"vLLM {engine.version}")


def check_target_architecture(facts: Facts) -> Iterator[Finding]:
    """Whether vLLM has the target, and hands out the hidden states of its layers."""
    id, engine = "target-architecture", facts.engine
    names = ", ".join(facts.target.architectures)
    if not names:
        yield warning(
            id,
            'the target\'s config.json has no "architectures"',
            "take the config.json of the model's publisher",
        )
    elif engine.knows_target is None:
        yield info(id, f"{names}: unknown whether vLLM can serve it, as no vLLM {engine.supported} was looked at")
    elif not engine.knows_target:
        yield warning(
            id,
            f"{names}: vLLM {engine.version} has no model class of this name",
            "serve it through another plugin or vLLM's Transformers backend, or take a target that vLLM lists",
        )
    elif engine.taps_target is None:
        yield info(id, f"{names}: vLLM has it; whether it hands out hidden states (SupportsEagle3) could not be told")
    elif not engine.taps_target:
        yield error(
            id,
            f"{names}: vLLM has it, but its class does not hand out hidden states (no SupportsEagle3)",
            "no drafter that reads hidden states works with it in vLLM; vllm_dflash.hf may serve it on Transformers",
        )
    else:
        yield ok(id, f"{names}: vLLM has it, and it hands out hidden states")
