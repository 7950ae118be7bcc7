# SPDX-License-Identifier: Apache-2.0
"""Outputs of the engine under test beside the reference's, token by token."""

from __future__ import annotations

import json
from collections import deque

from gpu.engine_process import Engine
from gpu.names import Record
from gpu.output import say
from gpu.soak.job import REFERENCE_BATCH
from vllm_dflash.benchmark.metrics import first_difference


class Comparison:
    """What is still to be checked, and what was found."""

    def __init__(self, near_tie: float, timeout: float) -> None:
        self.near_tie, self.timeout = near_tie, timeout
        self.waiting: deque[Record] = deque()  # outputs to be checked
        self.checking: list[Record] = []  # those that the reference is at
        self.counts = {"checked_requests": 0, "checked_tokens": 0}
        self.wrong: list[Record] = []
        self.near_ties: list[Record] = []

    def send(self, reference: Engine) -> None:
        self.checking = [self.waiting.popleft() for _ in range(min(REFERENCE_BATCH, len(self.waiting)))]
        reference.connection.send({"requests": self.checking})

    def take(self, token_ids: list[list[int]], reference: Engine) -> None:
        """The reference's answer to what was sent last."""
        for output, expected in zip(self.checking, token_ids, strict=True):
            self._compare(output, expected, reference)
        self.checking = []

    def _compare(self, output: Record, expected: list[int], reference: Engine) -> None:
        self.counts["checked_requests"] += 1
        position = first_difference(output["token_ids"], expected)
        self.counts["checked_tokens"] += len(expected) if position is None else position
        if position is None:
            return
        record = {key: output[key] for key in ("id", "complete", "max_tokens")}
        record |= {"prompt_tokens": len(output["prompt"]), "position": position}
        near = False
        if position < min(len(expected), len(output["token_ids"])):
            record |= self._explain(output, expected, position, reference)
            near = max(record["got_behind"], record["expected_behind"]) < self.near_tie
        else:
            record |= {"got_tokens": len(output["token_ids"]), "expected_tokens": len(expected)}
        (self.near_ties if near else self.wrong).append(record)
        say(f"{'near tie' if near else 'WRONG'}: {json.dumps(record)}")

    def _explain(self, output: Record, expected: list[int], position: int, reference: Engine) -> Record:
        """Both tokens at the difference, and how far the reference sees each behind its likeliest there."""
        top = reference.ask({"explain": output["prompt"] + expected[:position]}, self.timeout)
        got, wanted = output["token_ids"][position], expected[position]
        return {
            "got": got,
            "expected": wanted,
            "got_behind": behind(top, got),
            "expected_behind": behind(top, wanted),
            "reference_top": top,
        }

    def result(self) -> Record:
        return {
            **self.counts,
            "unchecked_requests": len(self.waiting) + len(self.checking),
            "wrong": self.wrong[:50],
            "wrong_requests": len(self.wrong),
            "near_ties": self.near_ties[:50],
            "near_tie_requests": len(self.near_ties),
        }


def behind(top: list[tuple[int, float]], token: int) -> float:
    """How far in logprob a token is behind the first; infinite where it is not among these."""
    return next((top[0][1] - logprob for other, logprob in top if other == token), float("inf"))
