# SPDX-License-Identifier: Apache-2.0
"""What an offline engine is asked to do, and what it reports back. Crosses a process boundary, so plain data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_dflash.benchmark.metrics import AcceptanceCounts, tokens_per_second


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
