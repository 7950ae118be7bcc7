# SPDX-License-Identifier: Apache-2.0
"""What an offline engine is asked to do, and what it reports back. Crosses a process boundary, so plain data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_dflash.benchmark.metrics import AcceptanceCounts, tokens_per_second
from vllm_dflash.benchmark.records import Counters
from vllm_dflash.benchmark.sets.conversations import Conversation


@dataclass(frozen=True)
class Prompt:
    """One prompt. Token ids, where there are any, are what the engine gets; the text is for people."""

    name: str
    text: str
    token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class EngineJob:
    """One engine and the prompts to run on it, one request at a time.

    drafter: None runs without speculation; num_speculative_tokens must be given exactly if it is.
    chat: whether prompts go through the target's chat template; None decides by whether it has one.
    warm_up: run the first prompt once, untimed, before the others.
    additional_config: vLLM's option of that name, which holds the plugin's under "dflash".
    """

    target: str
    prompts: tuple[Prompt, ...]
    drafter: str | None = None
    num_speculative_tokens: int | None = None
    dtype: str = "auto"
    max_tokens: int = 128
    temperature: float = 0.0
    chat: bool | None = False
    warm_up: bool = False
    additional_config: dict[str, Any] | None = None


@dataclass(frozen=True)
class Ready:
    """The engine has started, and warmed up if asked to."""

    seconds: float


@dataclass(frozen=True)
class Response:
    """One prompt's output; seconds is the wall time of its generating call, prefill included."""

    prompt: Prompt
    text: str
    token_ids: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Finished:
    """All prompts are done. acceptance covers them without the warm-up; None without speculation."""

    acceptance: AcceptanceCounts | None


@dataclass(frozen=True)
class EngineResult:
    """Everything one job gave."""

    startup_seconds: float
    responses: tuple[Response, ...]
    acceptance: AcceptanceCounts | None

    @property
    def num_tokens(self) -> int:
        return sum(len(response.token_ids) for response in self.responses)

    @property
    def tokens_per_second(self) -> float:
        """Pooled over all responses."""
        return tokens_per_second(self.num_tokens, sum(response.seconds for response in self.responses))


@dataclass(frozen=True)
class LoadJob:
    """One engine and the loads to put on it, one after the other. Fields of the same name: as in EngineJob.

    loads: conversations, and how many of them run at once.
    thinking: given to the chat template as enable_thinking; None leaves it out.
    warm_up: this many first turns of each load run before it, unmeasured.
    engine_args: further arguments of vLLM's `LLM(...)`.
    """

    target: str
    loads: tuple[tuple[tuple[Conversation, ...], int], ...]
    drafter: str | None = None
    num_speculative_tokens: int | None = None
    dtype: str = "auto"
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    chat: bool = True
    thinking: bool | None = None
    warm_up: int = 0
    timeout_seconds: float = 600.0
    engine_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadFinished:
    """One load is done. seconds: from its first request to its last token; counters: over it alone."""

    seconds: float
    counters: Counters
