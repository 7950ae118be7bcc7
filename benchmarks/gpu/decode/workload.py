# SPDX-License-Identifier: Apache-2.0
"""What is measured: the two models, and the prompts of every point."""

from __future__ import annotations

import argparse
from pathlib import Path

from gpu.decode.batch import PROFILED_STEPS, SKIPPED_STEPS
from gpu.decode.prompts import TAIL, held_out_prompts, random_prompts
from gpu.decode.shape import write_shape
from gpu.names import Record, size
from gpu.pair import read_pair
from vllm_dflash.options import MAX_AUTO_NODES


class Workload:
    """The part of the command line that engines and report have in common."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        if args.pair is None:
            write_shape(folder)
        self.args = args
        self.target, self.drafter = read_pair(args.pair or folder)
        self.k: int = args.k or self.drafter["block_size"] - 1

    @property
    def most_candidates(self) -> int:
        """That any engine verifies of a request in a step."""
        sizes = [size(name) or self.k for name in self.args.engines]
        return max(MAX_AUTO_NODES if number == "auto" else int(number) for number in sizes)

    @property
    def longest_output(self) -> int:
        return max(self.args.output_tokens, self.traced_output) if self.args.profile else self.args.output_tokens

    @property
    def traced_output(self) -> int:
        """Enough for the steps of a trace, should all drafts be accepted."""
        return (SKIPPED_STEPS + PROFILED_STEPS + 4) * (self.k + 1)

    @property
    def max_model_len(self) -> int:
        needed = max(self.args.contexts) + self.longest_output + self.most_candidates + 1
        limit = self.target["max_position_embeddings"]
        if needed > limit:
            raise SystemExit(f"--contexts {max(self.args.contexts)}: with the output that needs {needed} positions, "
                             f"the target has {limit}")  # fmt: skip
        return min(limit, -(-needed // 1024) * 1024)

    @property
    def most_requests(self) -> int:
        return max((*self.args.requests, *self.args.profile))

    @property
    def most_tokens(self) -> int:
        """Positions that the largest point needs room for."""
        grown = self.longest_output + 2 * (self.most_candidates + 1) + 16  # and the rest of the last block
        count = self.most_requests
        tokens = max(self._prompt_tokens(context, count) + count * grown for context in self.args.contexts)
        return max(tokens, self.max_model_len)

    def _prompt_tokens(self, context: int, count: int) -> int:
        return context + count * TAIL if self.shares(context) else count * context

    def shares(self, context: int) -> bool:
        return not self.args.real and context >= self.args.shared_from

    def request(self, prompts: list[list[int]], temperature: float | None = None) -> Record:
        """A batch of prompts; by default at the first temperature."""
        first = self.args.temperature[0]
        sampling = {"max_tokens": self.args.output_tokens, "temperature": first if temperature is None else temperature}
        return {"prompts": prompts, "counters": self.args.real} | sampling

    def load(self, context: int, users: int, temperature: float, turn: int) -> Record:
        """Requests that come and go, the same for all engines of a turn: some hundred prompts, asked in turn."""
        load = {
            "users": users,
            "seconds": self.args.arrivals,
            "shortest": max(1, self.args.output_tokens // 4),
            "longest": self.args.output_tokens,
            "temperature": temperature,
            "seed": turn,
        }
        return {"prompts": self.prompts(context, max(256, users), seed=turn, turn=turn), "load": load}

    def prompts(self, context: int, count: int, seed: int, turn: int = 0) -> list[list[int]]:
        if self.args.real:
            return held_out_prompts(self.args.pair / "heldout.jsonl", context, count, first=turn * count)
        return random_prompts(self.target["vocab_size"], context, count, seed, self.shares(context))
