# SPDX-License-Identifier: Apache-2.0
"""The number of nodes that a batch verifies, chosen at every step: `"tree": "auto"`.

vLLM's V2 runner has a seam for it, its adaptive verification: the scheduler plans for all nodes, the runner asks how
many of a step's rows are worth running, and shares them out between requests on the device. So the choice needs no
word of the scheduler's, and is made while the step before still runs. This is the object that it asks.

The host knows the trees of the step before last: their likelihoods are copied while the next step runs. How many nodes
there are to be is decided from those; which ones, on the device, from the trees themselves.

Letters: R requests, S rows of the runner's state, N nodes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_dflash.budget import Choice, DraftingGain, StepCosts, choose, even_shares
from vllm_dflash.compat.metrics.fallbacks import Fallback
from vllm_dflash.compat.metrics.meter import StepMeter
from vllm_dflash.compat.trees.costs import CostProfile, assumed_costs
from vllm_dflash.compat.trees.likelihoods import HostLikelihoods
from vllm_dflash.compat.trees.overhead import Overhead
from vllm_dflash.compat.trees.store import TreeStore
from vllm_dflash.kernels.share_nodes import share_nodes
from vllm_dflash.logs import logger

#: While nothing is drafted, one step of so many drafts all the same: is it worth it again? Of more steps where drafting
#: is dear, so that attempts take this share of the time at most, unless that were too seldom.
PROBE_STEPS, _MOST_PROBE_STEPS, _PROBE_SHARE = 48, 1024, 1 / 400
#: Overheads are looked at every so many steps, and ranks of a tensor-parallel group agree on them.
_OVERHEAD_STEPS = 32
#: Where the host is slower than the device whatever is verified, and where nothing is drafted, it decides for so many
#: steps at once. Of the last ones it looks how far the device is, and takes what they draft for the next decision.
_SETTLED_STEPS, _MARKED_STEPS = 16, 3
_LOG_SECONDS = 30.0


class TreeBudget:
    """What the V2 runner takes for its adaptive verification."""

    def __init__(self, max_num_reqs: int, num_nodes: int, device: torch.device, meter: StepMeter) -> None:
        self.num_nodes, self.device, self._meter = num_nodes, device, meter
        self.drafts = True  # whether the step under way drafts
        self.costs: StepCosts | None = None
        self.num_reqs = 0  # of the step under way
        #: Acceptance length at which the last step of verifications alone was worth its time; None: there was none yet.
        self.break_even: float | None = None
        self._has_drafts = False  # whether the step before did
        self._likelihoods = HostLikelihoods(max_num_reqs, num_nodes, device)
        self._overhead = Overhead(overlaps=False)
        self._costs_in_force: StepCosts | None = None  # with the overheads seen last
        self._requests: Set[str] = frozenset()  # of the step under way, or the last one
        self._is_begun = False
        self._num_steps = self._num_without = 0
        self._gain, self._num_noted = DraftingGain(), 0
        self._settled: _Settled | None = None
        # Of the step under way: nodes of all requests that were planned and that are verified; each request's rows,
        # and of these its planned nodes; bounds of their logits, if all is verified.
        self._num_planned = self._chosen = 0
        self._largest_graph = 0  # rows; 0: there are no graphs
        self._planned: np.ndarray = np.zeros(0, dtype=np.int32)
        self._scheduled: np.ndarray = np.zeros(0, dtype=np.int32)
        self._planned_logits: np.ndarray = np.zeros(1, dtype=np.int32)
        self._even_bounds: dict[int, torch.Tensor] = {}
        self._log = _Log()

    # Start-up, in the order that it happens.

    def begin(
        self, req_states: Any, query_start_loc: torch.Tensor, num_bonus_tokens: int, max_total_logits: int
    ) -> TreeBudget:
        """Learn the runner's structures. A runner begins twice: it profiles its memory with other ones."""
        assert num_bonus_tokens == 1, f"{num_bonus_tokens=}"
        self._req_states, self._query_start_loc = req_states, query_start_loc
        self._even_bounds.clear()
        self._cu_num_logits = torch.zeros_like(query_start_loc)
        self._max_total_logits = max_total_logits
        return self

    def bind(self, store: TreeStore, target: Any, dtype: torch.dtype, max_model_len: int, overlaps: bool) -> None:
        """Say where trees are kept, and what verifies them, in which type and up to which length.

        `overlaps`: the host prepares a step while the device computes the one before.
        """
        self._store, states = store, self._req_states
        self._overhead = Overhead(overlaps)
        sizes = (states.max_num_batched_tokens, states.max_num_reqs, max_model_len - 1 - self.num_nodes)
        self._profile = CostProfile(target, dtype, *sizes)
        self._compile_sharing()

    def batches_to_profile(self, capture_sizes: list[int]) -> Iterator[dict[str, Any]]:
        """Arguments of the made-up steps that the runner times."""
        self._largest_graph = max(capture_sizes, default=0)
        return self._profile.batches(capture_sizes, self._store)

    def set_initial_cost_curves(self, samples: Sequence[Any]) -> None:
        """What they took. The same on every rank of a tensor-parallel group: the first one's."""
        if not self._profile.planned:
            return  # nothing is captured whole
        self.costs, self._costs_in_force = get_tp_group().broadcast_object(self._profile.costs(samples), src=0), None
        assert self.costs is not None
        logger.info("vllm_dflash: %s", self.costs.summary())

    # A step, in the order that the runner asks.

    def add_request(self, req_idx: int) -> None:
        """A request takes a row of the state."""
        self._likelihoods.expect_average(req_idx)

    def get_num_tokens(self, num_tokens_per_req: dict[str, int], draft_tokens: dict[str, list[int]]) -> int:
        """Rows that the step runs, of those that were planned."""
        planned = [len(draft_tokens.get(req_id, ())) for req_id in num_tokens_per_req]
        num_reqs, num_rows, self._num_planned = len(planned), sum(num_tokens_per_req.values()), sum(planned)
        self.num_reqs, num_others = num_reqs, num_rows - self._num_planned
        self._begin_step(num_tokens_per_req)
        costs = self._costs_now()
        if self._settled is not None and self._settled.holds(num_reqs, num_rows):
            context, self.drafts = self._settled.context, self._settled.drafts
            self._chosen = self._num_planned if self.drafts else 0
            self._num_without += not self.drafts
        else:
            context = self._decide(num_tokens_per_req, planned, num_others, costs)
        num_rows = num_others + self._chosen
        if num_others == num_reqs:
            self._overhead.note(costs.gpu_ms(num_rows, num_reqs, context, self.drafts), self.drafts)
        return num_rows

    def _begin_step(self, num_tokens_per_req: dict[str, int]) -> None:
        """The step before has ended, unless it is long ago: of no request that goes on."""
        requests = num_tokens_per_req.keys()
        if requests.isdisjoint(self._requests):
            self._overhead.forget()
        self._overhead.begin_step(self.num_reqs)
        self._requests, self._is_begun = requests, True

    def _decide(
        self, num_tokens_per_req: dict[str, int], planned: list[int], num_others: int, costs: StepCosts
    ) -> float:
        """How many nodes are verified, and whether the step drafts, by what is known of the trees.

        Returns the slots of context that the batch reads.
        """
        states, num_reqs, most = self._req_states, len(planned), max(planned)
        state_rows: np.ndarray = np.array([states.req_id_to_index[req_id] for req_id in num_tokens_per_req])
        computed = states.num_computed_tokens_np[state_rows]
        context, known = float(computed.sum()), self._likelihoods.of(state_rows)
        # What is drafted now is verified when all of these requests have trees.
        all_nodes = _descending(known[:, : most or self.num_nodes], self._room(num_reqs, num_reqs))
        choice = later = choose(all_nodes, num_reqs, num_reqs, num_reqs, context, costs)
        if not (most > 0 and self._num_planned == num_reqs * most and num_others == num_reqs):
            others = np.array(list(num_tokens_per_req.values())) - planned
            ends_prompt = computed + others >= states.prefill_len.np[state_rows]
            has_tree = np.arange(self.num_nodes) < np.array(planned)[:, None]  # prompts have none yet
            planned_nodes = _descending(known[has_tree], self._room(num_reqs, num_others))
            choice = choose(planned_nodes, int(ends_prompt.sum()), num_others, num_reqs, context, costs)
        self._chosen = choice.budget if self._has_drafts else 0
        probe_steps = _probe_steps(later.step_ms / later.plain_ms - 1)
        self.drafts, self._settled = self._is_to_draft(later, probe_steps), None
        if self.drafts and self._has_drafts:
            self._settle(num_others + self._num_planned, context, costs)
        elif not self.drafts and not self._has_drafts:
            steps = min(probe_steps - 1 - self._num_without, _SETTLED_STEPS - 1)
            self._settled = _Settled(num_reqs, num_rows=0, context=context, steps_left=steps, drafts=False)
        if num_others == num_reqs:
            if self._likelihoods.num_reads:  # before, all nodes are taken to be certain
                self._log.note(num_reqs, self._chosen, later, self.drafts)
            if self._chosen:
                step_ms = costs.step_ms(num_reqs + self._chosen, num_reqs, context, drafts=True)
                self.break_even = step_ms / later.plain_ms
        return context

    def _settle(self, num_rows: int, context: float, costs: StepCosts) -> None:
        """Verify all nodes, of this step and the next ones, if they cost nothing."""
        most_logits, in_graphs = self._max_total_logits, self._largest_graph
        most_rows = min(costs.hidden_rows(self.num_reqs, context), most_logits, in_graphs or most_logits)
        if num_rows <= most_rows:
            self._settled = _Settled(self.num_reqs, most_rows, context)
            self._chosen = self._num_planned

    def _room(self, num_reqs: int, num_others: int) -> int:
        """Nodes at most. They alone never take a step out of the graphs: launches would cost the host more."""
        room = max(0, self._max_total_logits - num_reqs)
        return min(room, self._largest_graph - num_others) if num_others <= self._largest_graph else room

    def compact_batch(
        self,
        num_draft_tokens_per_req: np.ndarray,  # [R]
        num_scheduled_tokens: np.ndarray,  # [R]
        cu_num_logits_np: np.ndarray,  # [R+1]
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the host takes for the rows of each request [R], and for the bounds of their logits [R+1].

        Which request's the nodes are only the device knows; their sum is right.
        """
        self._planned, self._scheduled = num_draft_tokens_per_req, num_scheduled_tokens
        self._planned_logits = cu_num_logits_np
        if self._chosen == self._num_planned:
            return num_scheduled_tokens, cu_num_logits_np
        others = num_scheduled_tokens - num_draft_tokens_per_req
        if self._chosen == 0:
            return others, np.arange(len(others) + 1, dtype=cu_num_logits_np.dtype)
        shares = even_shares(num_draft_tokens_per_req.tolist(), self._chosen)
        return others + np.array(shares, dtype=others.dtype), cu_num_logits_np

    def reallocate_drafts(
        self, req_ids: list[str], idx_mapping: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The nodes shared out on the device: `cu_num_logits` [R+1], `query_start_loc`, and how many nodes it are."""
        bounds, num_reqs = self._cu_num_logits, len(req_ids)
        if self._chosen == 0 or num_reqs == 1:  # then the host's plan is right for each request
            bounds = self._bounds_of(self._chosen)
        elif self._chosen == self._num_planned:
            first = int(self._planned[0])
            is_even = first * num_reqs == self._num_planned and (self._planned == first).all()
            bounds = self._bounds_of(first) if is_even else async_tensor_h2d(self._planned_logits, device=self.device)
        else:
            planned, others = self._planned, self._scheduled - self._planned
            rows = async_tensor_h2d(np.stack((planned, others)), device=self.device, dtype=torch.int32)
            probs = self._store.trees.probs
            share_nodes(probs, idx_mapping, rows, self._chosen, bounds, self._query_start_loc)
        return bounds[: num_reqs + 1], self._query_start_loc, self._chosen

    def record_confidences(self, confidence_probs: torch.Tensor, input_batch: InputBatch) -> None:
        """The step has drafted, or not. Of settled steps only those at the end look at the device."""
        if not self._is_begun:  # a step of prompts alone, of which the runner asks nothing
            self._overhead.forget()
        self._is_begun = False
        self._overhead.waited(self._likelihoods.read())
        if self._settled is None or self._settled.ends_soon:
            if self.drafts:
                self._likelihoods.copy(self._store.trees.probs, input_batch.idx_mapping_np)
            else:
                self._likelihoods.mark()
        self._has_drafts = self.drafts

    @property
    def num_verified(self) -> int:
        """Nodes of all requests that the step under way verifies."""
        return self._chosen

    def _costs_now(self) -> StepCosts:
        if self.costs is None:
            logger.warning("vllm_dflash: without CUDA graphs steps are not timed, so their costs are assumed")
            self._meter.count(Fallback.ASSUMED_COSTS)
            self.costs = assumed_costs(self._req_states.max_num_batched_tokens, self._req_states.max_num_reqs)
        if self._costs_in_force is None or self._num_steps % _OVERHEAD_STEPS == 0:
            overheads_ms, host_ms = get_tp_group().broadcast_object(self._overhead.ms(self.num_reqs), src=0)
            self._costs_in_force = self.costs.with_overheads(overheads_ms, host_ms)
        self._num_steps += 1
        return self._costs_in_force

    def _bounds_of(self, num_nodes: int) -> torch.Tensor:
        """[requests + 1] bounds of their logits, where each verifies so many nodes."""
        if num_nodes not in self._even_bounds:
            numbers = torch.arange(len(self._cu_num_logits), dtype=torch.int32, device=self.device)
            self._even_bounds[num_nodes] = numbers * (1 + num_nodes)
        return self._even_bounds[num_nodes]

    def _compile_sharing(self) -> None:
        """The kernel's variants, by powers of two of requests, so that none is compiled while requests wait."""
        if self.device.type != "cuda":
            return
        probs, scratch = self._store.trees.probs, torch.zeros_like(self._cu_num_logits)
        for exponent in range(len(scratch).bit_length()):
            num_reqs = min(2**exponent, len(probs))
            rows = torch.ones(2, num_reqs, dtype=torch.int32, device=self.device)
            of_state = torch.arange(num_reqs, device=self.device)
            share_nodes(probs, of_state, rows, num_reqs, self._cu_num_logits, scratch)

    def _is_to_draft(self, choice: Choice, probe_steps: int) -> bool:
        """While nothing is drafted, trees are taken to be as likely as the last ones were."""
        num_noted, self._num_noted = self._num_noted, self._likelihoods.num_reads
        if self._gain.pays(choice, is_new=num_noted < self._num_noted):
            self._num_without = 0
            return True
        self._num_without += 1
        if self._num_without < probe_steps:
            return False
        self._num_without = 0
        return True


def _probe_steps(extra: float) -> int:
    """One of so many steps drafts, where drafting takes so much longer: 0.5 means half a step."""
    return min(max(PROBE_STEPS, math.ceil(extra / _PROBE_SHARE)), _MOST_PROBE_STEPS)


def _descending(
    likelihoods: np.ndarray,  # of any shape
    most: int,
) -> np.ndarray:
    """The largest ones."""
    return np.sort(likelihoods, axis=None)[::-1][:most]


@dataclass
class _Settled:
    """What was decided for some steps.

    All that is planned is verified while the host hides the batch's rows; or nothing is verified or drafted.
    """

    num_reqs: int  # at most; without drafts just so many
    num_rows: int  # at most; not looked at without drafts
    context: float  # slots that the batch reads, as of the decision
    steps_left: int = _SETTLED_STEPS - 1
    drafts: bool = True

    def holds(self, num_reqs: int, num_rows: int) -> bool:
        """Whether this step is one of them."""
        self.steps_left -= 1
        if self.steps_left < 0:
            return False
        if not self.drafts:
            return num_reqs == self.num_reqs
        return num_reqs <= self.num_reqs and num_rows <= self.num_rows

    @property
    def ends_soon(self) -> bool:
        """Whether this step leaves a mark that the next one looks at, and what it drafts for the next decision."""
        return self.steps_left < _MARKED_STEPS


class _Log:
    """What was chosen and why, now and then."""

    def __init__(self) -> None:
        self._last = float("-inf")

    def note(self, num_reqs: int, budget: int, choice: Choice, drafts: bool) -> None:
        now = time.monotonic()
        if now - self._last < _LOG_SECONDS:
            return
        self._last = now
        logger.info(
            "vllm_dflash: batch of %d: best are %d nodes, from which %.2f tokens a request are expected in %.2f ms%s; "
            "this step has %d",
            num_reqs, choice.budget, choice.expected / num_reqs, choice.step_ms,
            "" if drafts else ", worse than without drafts, so that nothing is drafted", budget,
        )  # fmt: skip
