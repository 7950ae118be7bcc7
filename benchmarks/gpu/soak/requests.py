# SPDX-License-Identifier: Apache-2.0
"""The requests of the load, drawn at random."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from gpu.names import Record


@dataclass
class Active:
    """A request that the engine is at."""

    request: Record
    abort_loop: float  # infinite for one that is not aborted by the clock
    abort_tokens: float  # infinite for one that is not aborted while it writes
    token_ids: list[int] = field(default_factory=list)

    def is_due(self, loop: int) -> bool:
        """Whether it is to be aborted now."""
        return loop >= self.abort_loop or len(self.token_ids) >= self.abort_tokens


class RandomRequests:
    """Requests, and when to abort some of them; one source of random numbers for the whole load."""

    def __init__(self, settings: Record) -> None:
        self.settings = settings
        self.rng = random.Random(settings["seed"])

    def request(self) -> Record:
        settings, rng = self.settings, self.rng
        return {
            "prompt": self.prompt(rng.randint(1, settings["longest_prompt"])),
            "max_tokens": rng.randint(1, settings["longest_output"]),
            "temperature": 1.0 if rng.random() < settings["sampled_share"] else 0.0,
            "stop_token_ids": settings["end_ids"] if rng.random() < 0.5 else [],
        }

    def activate(self, request: Record, loop: int, aborted: bool) -> Active:
        """The request as one that enters the engine at this loop."""
        active = Active(request, math.inf, math.inf)
        if aborted and self.rng.random() < 0.3:  # perhaps before its first token
            active.abort_loop = loop + self.rng.randint(1, 8)
        elif aborted:
            active.abort_tokens = self.rng.randint(1, request["max_tokens"])
        return active

    def prompt(self, length: int) -> list[int]:
        tokens = self.settings["tokens"]
        start = self.rng.randrange(len(tokens))
        return [tokens[(start + i) % len(tokens)] for i in range(length)]
