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

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_dflash.budget import Choice, StepCosts, choose, even_shares
from vllm_dflash.compat.trees.costs import CostProfile, assumed_costs
from vllm_dflash.compat.trees.likelihoods import HostLikelihoods
from vllm_dflash.compat.trees.overhead import Overhead
from vllm_dflash.compat.trees.store import TreeStore
from vllm_dflash.kernels.share_nodes import share_nodes
from vllm_dflash.logs import logger

#: While nothing is drafted, one step of so many drafts all the same: is it worth it again?
PROBE_STEPS = 48
#: Overheads are looked at every so many steps, and ranks of a tensor-parallel group agree on them.
_OVERHEAD_STEPS = 32
_LOG_SECONDS = 30.0


class TreeBudget:
    """What the V2 runner takes for its adaptive verification."""

    def __init__(self, max_num_reqs: int, num_nodes: int, device: torch.device) -> None:
        self.num_nodes, self.device = num_nodes, device
        self.drafts = True  # whether the step under way drafts
        self.costs: StepCosts | None = None
        self._has_drafts = False  # whether the step before did
        self._likelihoods = HostLikelihoods(max_num_reqs, num_nodes, device)
        self._overhead = Overhead()
        self._overheads_ms = (0.0, 0.0)
        self._num_steps = self._num_without = 0
        # Of the step under way: nodes of all requests, and for each what was planned, and its other rows.
        self._chosen = 0
        self._planned: np.ndarray = np.zeros(0, dtype=np.int32)
        self._others: np.ndarray = np.zeros(0, dtype=np.int32)
        self._planned_logits: np.ndarray = np.zeros(1, dtype=np.int32)  # their bounds, if all is verified
        self._log = _Log()

    # Start-up, in the order that it happens.

    def begin(
        self, req_states: Any, query_start_loc: torch.Tensor, num_bonus_tokens: int, max_total_logits: int
    ) -> TreeBudget:
        """Learn the runner's structures. A runner begins twice: it profiles its memory with other ones."""
        assert num_bonus_tokens == 1, f"{num_bonus_tokens=}"
        self._req_states, self._query_start_loc = req_states, query_start_loc
        self._cu_num_logits = torch.zeros_like(query_start_loc)
        self._max_total_logits = max_total_logits
        return self

    def bind(self, store: TreeStore, target: Any, dtype: torch.dtype, max_model_len: int) -> None:
        """Say where trees are kept, and what verifies them, in which type and up to which length."""
        self._store, states = store, self._req_states
        sizes = (states.max_num_batched_tokens, states.max_num_reqs, max_model_len - 1 - self.num_nodes)
        self._profile = CostProfile(target, dtype, *sizes)

    def batches_to_profile(self, capture_sizes: list[int]) -> Iterator[dict[str, int]]:
        """Arguments of the made-up steps that the runner times."""
        return self._profile.batches(capture_sizes)

    def set_initial_cost_curves(self, samples: Sequence[Any]) -> None:
        """What they took. The same on every rank of a tensor-parallel group: the first one's."""
        if not self._profile.planned:
            return  # nothing is captured whole
        self.costs = get_tp_group().broadcast_object(self._profile.costs(samples), src=0)
        assert self.costs is not None
        logger.info("vllm_dflash: %s", self.costs.summary())

    # A step, in the order that the runner asks.

    def add_request(self, req_idx: int) -> None:
        """A request takes a row of the state."""
        self._likelihoods.expect_average(req_idx)

    def get_num_tokens(self, num_tokens_per_req: dict[str, int], draft_tokens: dict[str, list[int]]) -> int:
        """Rows that the step runs, of those that were planned."""
        self._overhead.begin_step()
        req_ids = list(num_tokens_per_req)
        planned: np.ndarray = np.array([len(draft_tokens.get(req_id, ())) for req_id in req_ids])
        others = np.array(list(num_tokens_per_req.values())) - planned
        state_rows = np.array([self._req_states.req_id_to_index[req_id] for req_id in req_ids])
        computed = self._req_states.num_computed_tokens_np[state_rows]
        ends_prompt = computed + others >= self._req_states.prefill_len.np[state_rows]
        known, costs = self._likelihoods.of(state_rows), self._costs_now()
        room = max(0, self._max_total_logits - len(req_ids))
        context = float(computed.sum())
        planned_nodes = _descending(known[np.arange(self.num_nodes) < planned[:, None]], room)
        choice = choose(planned_nodes, int(ends_prompt.sum()), int(others.sum()), len(req_ids), context, costs)
        self._chosen = choice.budget if self._has_drafts else 0
        if planned.min() < planned.max() or not planned.any():
            # Prompts have no trees yet. What is drafted now is verified when all of these requests have.
            all_nodes = _descending(known[:, : int(planned.max()) or self.num_nodes], room)
            choice = choose(all_nodes, len(req_ids), len(req_ids), len(req_ids), context, costs)
        self.drafts = self._is_to_draft(choice)
        num_rows = int(others.sum()) + self._chosen
        if (others == 1).all():
            self._overhead.note(costs.gpu_ms(num_rows, len(req_ids), context, self.drafts), self.drafts)
            self._log.note(len(req_ids), self._chosen, choice, self.drafts)
        return num_rows

    def compact_batch(
        self,
        num_draft_tokens_per_req: np.ndarray,  # [R]
        num_scheduled_tokens: np.ndarray,  # [R]
        cu_num_logits_np: np.ndarray,  # [R+1]
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the host takes for the rows of each request [R], and for the bounds of their logits [R+1].

        Which request's the nodes are only the device knows; their sum is right.
        """
        planned, others = num_draft_tokens_per_req, num_scheduled_tokens - num_draft_tokens_per_req
        self._planned, self._others = planned.astype(np.int32), others.astype(np.int32)
        self._planned_logits = cu_num_logits_np
        if self._chosen == planned.sum():
            return num_scheduled_tokens, cu_num_logits_np
        if self._chosen == 0:
            return others, np.arange(len(others) + 1, dtype=cu_num_logits_np.dtype)
        return others + even_shares(planned, self._chosen).astype(others.dtype), cu_num_logits_np

    def reallocate_drafts(
        self, req_ids: list[str], idx_mapping: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The nodes shared out on the device: `cu_num_logits` [R+1], `query_start_loc`, and how many nodes it are."""
        if self._chosen in (0, int(self._planned.sum())):  # then the host's plan is right for each request
            bounds = np.arange(len(req_ids) + 1, dtype=np.int32) if not self._chosen else self._planned_logits
            return async_tensor_h2d(bounds, device=self.device), self._query_start_loc, self._chosen
        share_nodes(
            self._store.trees.probs,
            idx_mapping,
            async_tensor_h2d(np.stack((self._planned, self._others)), device=self.device),
            self._chosen,
            self._cu_num_logits,
            self._query_start_loc,
        )
        return self._cu_num_logits[: len(req_ids) + 1], self._query_start_loc, self._chosen

    def record_confidences(self, confidence_probs: torch.Tensor, input_batch: InputBatch) -> None:
        """The step has drafted, or not."""
        self._likelihoods.read()
        if self.drafts:
            self._likelihoods.copy(self._store.trees.probs, input_batch.idx_mapping_np)
        self._has_drafts = self.drafts

    @property
    def num_verified(self) -> int:
        """Nodes of all requests that the step under way verifies."""
        return self._chosen

    def _costs_now(self) -> StepCosts:
        if self.costs is None:
            logger.warning("vllm_dflash: without CUDA graphs steps are not timed, so their costs are assumed")
            self.costs = assumed_costs(self._req_states.max_num_batched_tokens, self._req_states.max_num_reqs)
        if self._num_steps % _OVERHEAD_STEPS == 0:
            self._overheads_ms = get_tp_group().broadcast_object(self._overhead.ms(), src=0)
        self._num_steps += 1
        return self.costs.with_overheads(*self._overheads_ms)

    def _is_to_draft(self, choice: Choice) -> bool:
        """While nothing is drafted, trees are taken to be as likely as the last ones were."""
        if choice.is_worth_drafting:
            self._num_without = 0
            return True
        self._num_without += 1
        return self._num_without % PROBE_STEPS == 0


def _descending(
    likelihoods: np.ndarray,
    most: int,
) -> np.ndarray:
    """The largest ones."""
    return np.sort(likelihoods, axis=None)[::-1][:most]


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
            "vllm_dflash: %d requests verify %d nodes; with %d, %.2f tokens a request are expected in %.2f ms%s",
            num_reqs, budget, choice.budget, choice.expected / num_reqs, choice.step_ms,
            "" if drafts else "; more without drafting, so nothing is drafted",
        )  # fmt: skip
