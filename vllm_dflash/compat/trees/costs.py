# SPDX-License-Identifier: Apache-2.0
"""What steps cost, from made-up ones that the runner times on its captured graphs at start-up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from vllm_dflash.budget import StepCosts, stepped
from vllm_dflash.compat.trees.store import TreeStore

_REPLAYS = 4
#: Slots of context of each made-up request, where it has any; of a few batches so many, for what a slot costs.
_CONTEXT, _LONG_CONTEXT = 512, 4096
_LOGITS_ROWS = (1, 16, 64, 128, 256, 512, 1024)


class CostProfile:
    """Which steps are timed, and the tables that come of it."""

    def __init__(
        self, target: Any, dtype: torch.dtype, max_num_rows: int, max_num_reqs: int, longest_context: int
    ) -> None:
        self.target, self.dtype = target, dtype
        self.max_num_rows, self.max_num_reqs = max_num_rows, max_num_reqs
        self.context, self.long_context = (max(0, min(c, longest_context)) for c in (_CONTEXT, _LONG_CONTEXT))
        self.planned: list[tuple[int, int]] = []  # rows and context
        self.plain: list[int] = []  # rows, of steps without candidates
        self.largest = 0  # rows of a graph

    def batches(self, capture_sizes: list[int], store: TreeStore) -> Iterator[dict[str, Any]]:
        """Arguments of made-up steps: every captured size, and the next one without a graph.

        In these each row is a request of its own, as far as there may be so many. What reading context takes depends on
        the requests, so that it is timed apart, at sizes of that many. Then come graphs for steps without candidates:
        they have to be run while the iterator stands at them.
        """
        self.largest = largest = capture_sizes[-1] if capture_sizes else 0
        beyond = {min(2 * largest, self.max_num_rows)} - {*capture_sizes, 0}
        of_requests = [size for size in capture_sizes if size <= self.max_num_reqs]
        if self.max_num_reqs not in of_requests:
            of_requests += capture_sizes[len(of_requests) :][:1]
        long = [size for size in of_requests if size >= min(32, of_requests[-1])]
        self.planned = [(size, 0) for size in [*capture_sizes, *beyond]]
        if self.context > 0:
            self.planned += [(size, self.context) for size in of_requests]
        if self.long_context > self.context:
            self.planned += [(size, self.long_context) for size in sorted({*long[:1], *long[-1:]})]
        self.plain = sorted(store.plain_sizes.intersection(of_requests))
        with store.timed():
            for rows, context in self.planned:
                yield from [_made_up(rows, context)] * _REPLAYS
            with store.without_candidates():
                for rows in self.plain:
                    yield from [_made_up(rows, self.context)] * _REPLAYS

    def costs(self, samples: Sequence[Any]) -> StepCosts:
        """Tables of the timed steps, in the order that they were planned."""
        num_steps = _REPLAYS * (len(self.planned) + len(self.plain))
        if len(samples) != num_steps:
            raise RuntimeError(f"{num_steps} made-up steps were planned, {len(samples)} timed")
        medians = [
            float(np.median([sample.forward_ms for sample in samples[start : start + _REPLAYS]]))
            for start in range(0, num_steps, _REPLAYS)
        ]
        forwards = dict(zip(self.planned, medians, strict=False))
        drafts: defaultdict[int, list[float]] = defaultdict(list)
        for sample in samples:
            if sample.full_cudagraph:  # else the host's launches are timed
                drafts[sample.num_reqs].append(sample.drafter_ms)
        trees_ms = self._trees_ms(forwards, medians[len(self.planned) :])
        verify = sorted(
            (rows, ms - (trees_ms[self._num_reqs(rows)] if rows <= self.largest else 0.0))
            for (rows, context), ms in forwards.items()
            if context == 0
        )
        slopes = [
            (ms - forwards[rows, self.context]) / (self._num_reqs(rows) * (self.long_context - self.context))
            for (rows, context), ms in forwards.items()
            if context > self.context
        ]
        draft = sorted((num_reqs, float(np.median(ms))) for num_reqs, ms in drafts.items())
        return StepCosts(
            verify_ms=stepped(verify, self.max_num_rows) + self._logits_ms(),
            draft_ms=stepped(draft or [(1, 0.0)], self.max_num_reqs),
            context_ms=max(0.0, min(slopes, default=0.0)),
            attention_ms=self._attention_ms(forwards),
            profiled_context=self.context,
            trees_ms=trees_ms,
        )

    def _num_reqs(self, rows: int) -> int:
        """Of a made-up step."""
        return min(rows, self.max_num_reqs)

    def _attention_ms(
        self,
        forwards: Mapping[tuple[int, int], float],  # by rows and context
    ) -> np.ndarray:
        """[requests + 1]: what reading the made-up context adds."""
        of_sizes = ((rows, ms) for (rows, context), ms in sorted(forwards.items()) if context == self.context > 0)
        return self._by_requests([(self._num_reqs(rows), ms - forwards[rows, 0]) for rows, ms in of_sizes])

    def _trees_ms(
        self,
        forwards: Mapping[tuple[int, int], float],  # by rows and context
        plain_ms: Sequence[float],  # of the plain sizes
    ) -> np.ndarray:
        """[requests + 1]: what a graph for candidates takes more, without any: all but the work on these."""
        of_sizes = zip(self.plain, plain_ms, strict=True)
        return self._by_requests([(rows, forwards[rows, self.context] - ms) for rows, ms in of_sizes])

    def _by_requests(self, added: Sequence[tuple[int, float]]) -> np.ndarray:
        """[requests + 1]: ms by requests: in between lines, as none of them is padding, and beyond in proportion."""
        counts, values = (np.array(column) for column in zip((0, 0.0), *added, strict=True))
        wanted, values = np.arange(self.max_num_reqs + 1), np.maximum.accumulate(values)
        return np.interp(wanted, counts, values) * np.maximum(wanted / max(counts[-1], 1), 1.0)

    def _logits_ms(self) -> np.ndarray:
        """[rows + 1]: the LM head, and the choice of a token."""
        device = next(self.target.parameters()).device
        hidden_size = self.target.config.get_text_config().hidden_size
        hidden = torch.randn(max(_LOGITS_ROWS), hidden_size, dtype=self.dtype, device=device)

        def head(rows: int) -> None:
            self.target.compute_logits(hidden[:rows]).argmax(dim=-1)

        timed = [(rows, _gpu_ms(partial(head, rows))) for rows in _LOGITS_ROWS]
        sizes, values = (np.array(column) for column in zip(*timed, strict=True))
        wanted = np.arange(self.max_num_rows + 1)
        slope = (values[-1] - values[-2]) / (sizes[-1] - sizes[-2])
        behind = np.maximum(wanted - sizes[-1], 0) * max(slope, 0.0)
        return np.interp(wanted, sizes, np.maximum.accumulate(values)) + behind


def _made_up(rows: int, context: int) -> dict[str, Any]:
    """A step of other tokens in each row: a GPU multiplies equal rows faster, and a router sends them one way."""
    return {"num_tokens": rows, "context_len": context, "randomize_inputs": True}


def _gpu_ms(run: Callable[[], None]) -> float:
    """Median of some runs, after a first one."""
    run()
    times = []
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(np.median(times))


def assumed_costs(max_num_rows: int, max_num_reqs: int) -> StepCosts:
    """Of an engine without CUDA graphs, whose steps are not timed: flat up to 128 rows, as a GPU's memory has it."""
    rows = np.arange(max_num_rows + 1)
    return StepCosts(
        verify_ms=np.maximum(rows, 128.0) / 128.0,
        draft_ms=np.full(max_num_reqs + 1, 0.2),
    )
