# SPDX-License-Identifier: Apache-2.0
"""Whether the drafter was made for this target."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_dflash.doctor.facts import Facts
from vllm_dflash.doctor.finding import Finding, error, info, ok, warning
from vllm_dflash.validation import TargetFacts, pair_problems

#: part -> (the drafter's key, the target's key, what is said where they agree, what to change where they do not)
_PARTS = {
    "target-layers": (
        "target_layer_ids",
        "num_hidden_layers",
        "",
        "take the drafter of this very target; if the ids count the embedding as 0, lower each by one",
    ),
    "target-depth": (
        "num_target_layers",
        "num_hidden_layers",
        "num_target_layers = {}, as the target has",
        "take the drafter of this very target, or correct num_target_layers",
    ),
    "hidden-size": (
        "target_hidden_size",
        "hidden_size",
        "{}, as the target's",
        "take the drafter of this very target",
    ),
    "vocabulary": (
        "vocab_size",
        "vocab_size",
        "{} tokens, as the target's",
        "take the drafter of this very target, or the same revision of it: some pad the vocabulary",
    ),
}


def check_pair(facts: Facts) -> Iterator[Finding]:
    """Layers, hidden size and vocabulary against the target's."""
    config, target = facts.drafter.config, facts.target
    if config is None:
        return
    # A number that the target does not tell is taken to fit, and said to be unknown below.
    known = TargetFacts(
        model=target.source,
        num_hidden_layers=target.number("num_hidden_layers") or config.num_target_layers or 10**9,
        hidden_size=target.number("hidden_size") or config.target_hidden_size,
        vocab_size=target.number("vocab_size") or config.vocab_size,
    )
    problems = {problem.part: problem.message for problem in pair_problems(config, known)}
    for part, (key, of_target, agreed, change) in _PARTS.items():
        readable = facts.drafter.can_read(key) and (
            key != "target_hidden_size" or facts.drafter.can_read("hidden_size")
        )
        if not readable:
            continue
        if target.number(of_target) is None:
            yield info(part, f"the target's config.json tells no {of_target}, so this was not compared")
        elif part in problems:
            yield error(part, problems[part], change)
        elif agreed and getattr(config, key) is not None:
            yield ok(part, agreed.format(getattr(config, key)))


def check_identity(facts: Facts) -> Iterator[Finding]:
    """Whether the drafter's own note of its target names this one. Only speculators writes such a note."""
    noted = facts.drafter.raw.get("speculators_config")
    verifier = noted.get("verifier") if isinstance(noted, dict) else None
    if not isinstance(verifier, dict):
        return
    trained, here = verifier.get("architectures") or [], list(facts.target.architectures)
    name = verifier.get("name_or_path") or "?"
    if trained and here and trained != here:
        yield warning(
            "target-identity",
            f"the drafter was trained for {name} ({', '.join(trained)}), the target is {', '.join(here)}",
            "take the drafter of this very target",
        )
    else:
        yield ok("target-identity", f"trained for {name}, by the drafter's own note")
