# SPDX-License-Identifier: Apache-2.0
"""In which order engines take turns: none always right after the same other one, which may have heated the card."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

MOST_IN_EVERY_ORDER = 4  # engines; of five there are 120 orders


def orders(names: Sequence[str], seed: int) -> Iterator[tuple[str, ...]]:
    """One order a round, without end: of few engines every order there is, of more drawn ones."""
    rng = random.Random(seed)
    if len(names) <= MOST_IN_EVERY_ORDER:
        every = list(itertools.permutations(names))
        yield from itertools.cycle(rng.sample(every, len(every)))
    else:
        while True:
            yield tuple(rng.sample(names, len(names)))
