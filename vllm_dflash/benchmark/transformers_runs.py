# SPDX-License-Identifier: Apache-2.0
"""Runs on Transformers: the target's own `generate`, and `spec_generate` with the drafter, prompt by prompt in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm_dflash.benchmark.metrics import counts_of_rounds
from vllm_dflash.benchmark.notes import with_notes
from vllm_dflash.benchmark.records import Counters, RequestError, RequestRecord, ResponseAcceptance, Run
from vllm_dflash.benchmark.sets.conversations import Conversation, PromptSet
from vllm_dflash.benchmark.templates import prompt_ids

if TYPE_CHECKING:
    import torch

PLAIN, OURS = "generate", "spec_generate"


@dataclass(frozen=True)
class TransformersJob:
    """What to load and how to generate. Fields as in `LoadJob`; device None: the GPU if there is one."""

    target: str
    drafter: str
    dtype: str
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    chat: bool
    thinking: bool | None
    warm_up: int
    device: str | None = None


class Clock:
    """A streamer that notes when the first and the last tokens came. Its first call brings the prompt, not a token."""

    def __init__(self) -> None:
        self.first_token: float | None = None
        self.last_token: float | None = None
        self._prompt_came = False

    def put(self, value: Any) -> None:
        now = time.perf_counter()
        if self._prompt_came:
            self.first_token = now if self.first_token is None else self.first_token
            self.last_token = now
        self._prompt_came = True

    def end(self) -> None:
        pass


class Pair:
    """A target and its drafter, loaded."""

    def __init__(self, job: TransformersJob) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        from vllm_dflash.hf import DFlashDraftModel
        from vllm_dflash.hf.sequences import id_list

        disable_progress_bar()
        device = job.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
        dtype: Any = job.dtype if job.dtype == "auto" else getattr(torch, job.dtype)
        self.job = job
        self.tokenizer = AutoTokenizer.from_pretrained(job.target)
        self.target = AutoModelForCausalLM.from_pretrained(job.target, dtype=dtype).to(device).eval()
        self.drafter = DFlashDraftModel.from_pretrained(job.drafter, dtype=self.target.dtype).to(device).eval()
        self.stop_token_ids = id_list(self.target.generation_config.eos_token_id)

    def token_ids(self, messages: list[dict[str, str]]) -> torch.Tensor:
        """[1, P]. Raises ValueError for what the chat template refuses."""
        import torch

        ids = prompt_ids(self.tokenizer, messages, self.job.chat, self.job.thinking)
        return torch.tensor([ids], device=self.target.device)

    def generate(self, ids: torch.Tensor, clock: Clock) -> tuple[torch.Tensor, list[int]]:
        """ids [1, P]. The whole sequence [1, P+n], and no acceptance lengths."""
        import torch

        # What is not said would come from the model's generation_config, which the other backends do not read.
        sampling: dict[str, Any] = {"do_sample": self.job.temperature > 0, "repetition_penalty": 1.0}
        if self.job.temperature > 0:
            sampling |= {"temperature": self.job.temperature, "top_p": self.job.top_p, "top_k": 0, "min_p": 0.0}
        sequences = self.target.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.job.max_tokens, streamer=clock,
            eos_token_id=self.stop_token_ids or None, pad_token_id=0, **sampling,
        )  # fmt: skip
        return sequences, []

    def spec_generate(self, ids: torch.Tensor, clock: Clock) -> tuple[torch.Tensor, list[int]]:
        """ids [1, P]. The whole sequence [1, P+n], and what each round accepted with its bonus token."""
        output = self.drafter.spec_generate(
            ids, self.target, self.job.max_tokens, temperature=self.job.temperature, return_stats=True,
            top_p=self.job.top_p if self.job.temperature > 0 and self.job.top_p < 1 else None,
            stop_token_ids=self.stop_token_ids or None, streamer=clock,
        )  # fmt: skip
        return output.sequences, output.acceptance_lengths


def run_transformers(
    job: TransformersJob,
    prompt_sets: Sequence[PromptSet],
    on_start: Callable[[str, str, int, int], None],
    on_record: Callable[[RequestRecord], None],
) -> Generator[Run, None, None]:
    """Two runs for each prompt set, one request at a time.

    Ctrl-C gives what there is, and ends. So does an error, which is raised behind it.

    The systems take turns conversation by conversation, so a run's seconds are the sum of its requests' own.
    """
    import torch

    on_start("Transformers", "models load", 0, 0)
    pair = Pair(job)
    for prompt_set in prompt_sets:
        torch.manual_seed(job.seed)
        measured = {PLAIN: Measured(), OURS: Measured()}
        end: BaseException | None = None
        try:
            for conversation in prompt_set.conversations[: job.warm_up]:
                first_turn = replace(conversation, turns=conversation.turns[:1])
                for system in measured:
                    converse(pair, system, first_turn, Measured())
            turns = sum(len(conversation.turns) for conversation in prompt_set.conversations)
            on_start("Transformers", prompt_set.name, 1, 2 * turns)
            for conversation in prompt_set.conversations:
                for system, into in measured.items():
                    converse(pair, system, conversation, into, on_record)
        except (KeyboardInterrupt, Exception) as error:
            end = error
        for system, into in measured.items():
            yield with_notes(into.run(system, prompt_set.name, pair.drafter.block_size - 1, end is not None))
        if isinstance(end, Exception):
            raise end
        if end:
            return


class Measured:
    """One system's records on one prompt set, as if they had followed each other without a gap."""

    def __init__(self) -> None:
        self.records: list[RequestRecord] = []
        self.lengths: list[int] = []
        self.seconds = 0.0

    def run(self, system: str, dataset: str, num_speculative_tokens: int, interrupted: bool) -> Run:
        counters = Counters(counts_of_rounds(self.lengths, num_speculative_tokens)) if self.lengths else None
        return Run(system, dataset, 1, self.seconds, tuple(self.records), counters, interrupted=interrupted)


def converse(
    pair: Pair,
    system: str,
    conversation: Conversation,
    into: Measured,
    on_record: Callable[[RequestRecord], None] = lambda record: None,
) -> None:
    """All turns of one conversation on one system."""
    messages = list(conversation.history)
    for number, turn in enumerate(conversation.turns, start=1):
        messages.append({"role": "user", "content": turn})
        clock, started = Clock(), time.perf_counter()
        try:
            ids = pair.token_ids(messages)
            started = time.perf_counter()
            sequences, lengths = (pair.generate if system == PLAIN else pair.spec_generate)(ids, clock)
        except ValueError as error:  # a prompt beyond the model's length, or messages that the template does not take
            refused = RequestError("refused", str(error)[:200])
            into.records.append(RequestRecord(conversation.name, number, into.seconds, into.seconds, error=refused))
            on_record(into.records[-1])
            return
        new_ids = sequences[0, ids.shape[1] :].tolist()
        seconds = time.perf_counter() - started
        offset = into.seconds - started
        into.records.append(
            RequestRecord(
                conversation.name,
                number,
                into.seconds,
                into.seconds + seconds,
                None if clock.first_token is None else clock.first_token + offset,
                None if clock.last_token is None else clock.last_token + offset,
                ids.shape[1],
                len(new_ids),
                _acceptance(lengths, pair.drafter.block_size - 1),
            )  # fmt: skip
        )
        into.seconds += seconds
        into.lengths += lengths
        on_record(into.records[-1])
        messages.append({"role": "assistant", "content": pair.tokenizer.decode(new_ids, skip_special_tokens=True)})


def _acceptance(lengths: Sequence[int], num_speculative_tokens: int) -> ResponseAcceptance | None:
    counts = counts_of_rounds(lengths, num_speculative_tokens)
    if counts.acceptance_length is None:
        return None
    return ResponseAcceptance(counts.acceptance_length, counts.drafts, counts.accepted_tokens, counts.drafted_tokens)
