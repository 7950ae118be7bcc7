# SPDX-License-Identifier: Apache-2.0
"""The chat template: whether there is one, and whether it knows a thinking mode."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_dflash.doctor.facts import Facts
from vllm_dflash.doctor.finding import Finding, error, info, ok


def check_templates(facts: Facts) -> Iterator[Finding]:
    """A drafter foresees the kind of text that it was trained on."""
    tokenizer = facts.target.tokenizer
    if tokenizer is None:
        yield info("chat-template", "the target has no tokenizer files: pass token ids, or --tokenizer to vLLM")
        return
    if tokenizer.problem:
        yield error("tokenizer", tokenizer.problem, "take the tokenizer files of the model's publisher")
        return
    if not tokenizer.chat_templates:
        yield info(
            "chat-template",
            "the target has no chat template: chat requests are refused, plain completions are not",
            "pass --chat-template if the drafter was trained on chats",
        )
        return
    yield ok("chat-template", "the target has one")
    if tokenizer.has_thinking_switch:
        yield info(
            "thinking",
            "the chat template has a thinking mode (enable_thinking). A drafter trained without it drafts thoughts "
            "badly: the commonest cause of low acceptance",
            "find out how the drafter was trained, or compare both modes with --run N; requests choose by "
            '"chat_template_kwargs": {"enable_thinking": false}',
        )
    else:
        yield ok("thinking", "the chat template has no such switch")
