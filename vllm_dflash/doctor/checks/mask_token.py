# SPDX-License-Identifier: Apache-2.0
"""The token that stands for what is to be drafted must be nothing else."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_dflash.doctor.facts import Facts, TokenizerFacts
from vllm_dflash.doctor.finding import Finding, info, ok, warning

_ID = "mask-token"
_TEXT_ID = "mask-token-text"
_CHANGE = "set dflash_config.mask_token_id to the id that the drafter was trained with"


def check_mask_token(facts: Facts) -> Iterator[Finding]:
    """What the target's tokenizer makes of the mask id. Its range is checked when the config is read."""
    if facts.drafter.config is None or not facts.drafter.can_read("mask_token_id"):
        return
    mask, tokenizer = facts.drafter.config.mask_token_id, facts.target.tokenizer
    if tokenizer is None or not tokenizer.tokens:
        yield info(_ID, f"mask token id {mask}; the target has no tokenizer.json to compare it with")
        return
    text = tokenizer.tokens.get(mask)
    named = next((id for id, one in tokenizer.tokens.items() if one == tokenizer.mask_token), None)
    uses = _uses(tokenizer, facts.target.end_token_ids, mask, text)
    if uses:
        yield warning(_TEXT_ID, f"mask token id {mask} is {text!r}: {uses}", _CHANGE)
    elif named not in (None, mask):
        meant = "no token" if text is None else f"{text!r}"
        own = f"the tokenizer's own mask token {tokenizer.mask_token!r} is {named}"
        yield warning(_ID, f"mask token id {mask} is {meant}, but {own}", _CHANGE)
    elif text is None:
        yield ok(_ID, f"{mask}, a row of the embedding that no token has")
    else:
        yield ok(_ID, f"{mask}, {text!r} in the target's tokenizer")


def _uses(tokenizer: TokenizerFacts, ends: tuple[int, ...], mask: int, text: str | None) -> str:
    """What else the token is for; empty if nothing."""
    if text is None or text == tokenizer.mask_token:
        return ""
    roles = [role.removesuffix("_token") for role, id in tokenizer.roles.items() if id == mask]
    if mask in ends and "eos" not in roles:
        roles.append("end of a response")
    if roles:
        return f"the tokenizer's {' and '.join(roles)} token"
    if any(text in template for template in tokenizer.chat_templates):
        return "a token of the chat template"
    return "" if mask in tokenizer.special else "a token of plain text"
