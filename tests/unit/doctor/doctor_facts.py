# SPDX-License-Identifier: Apache-2.0
"""Facts of the tiny pair of tests/helpers.py, without files."""

from typing import Any

from tests.helpers import drafter_config, target_config
from vllm_dflash.doctor.drafter_config import ReadConfig
from vllm_dflash.doctor.facts import Drafter, Facts, Target, TokenizerFacts, Weights

_DEFAULT = Weights()


def facts(
    target: dict[str, Any] | None = None,
    drafter: dict[str, Any] | None = None,
    *,
    tokenizer: TokenizerFacts | None = None,
    target_weights: Weights = _DEFAULT,
    drafter_weights: Weights = _DEFAULT,
    end_token_ids: tuple[int, ...] = (),
    **others: Any,  # asked, engine, machine
) -> Facts:
    """Raw configs default to those of the tiny pair."""
    raw_target, raw = target or target_config(), drafter or drafter_config()
    text = raw_target.get("text_config", raw_target)
    read = ReadConfig(raw, "draft", text)
    errors = (tuple(read.config_errors), tuple(read.other_errors))
    of_drafter = Drafter("draft", raw, read.flat, read.config, *errors, weights=drafter_weights)
    of_target = Target("target", raw_target, text, target_weights, tokenizer, end_token_ids)
    return Facts(of_target, of_drafter, **others)
