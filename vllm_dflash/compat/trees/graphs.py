# SPDX-License-Identifier: Apache-2.0
"""The target's CUDA graphs where the trees follow the load: steps that verify some nodes, and steps that verify none.

Where query lengths vary, vLLM captures graphs of one kind, and the trees' part of attention is in all of them. While
drafting does not pay, steps have one row a request. These get graphs of their own, with vLLM's own attention, so that
they take what they take without speculation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager

from vllm_dflash.compat.trees.model_state import TreeModelState
from vllm_dflash.compat.trees.store import TreeStore


class TreeGraphs(ModelCudaGraphManager):
    """vLLM's graphs, and more of them for steps without candidates."""

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, cudagraph_mode: CUDAGraphMode, **options: Any
    ) -> None:
        super().__init__(vllm_config, device, cudagraph_mode, **options)
        self._trees: TreeStore | None = None
        full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        mode = CUDAGraphMode.FULL_DECODE_ONLY if full else CUDAGraphMode.NONE
        self._plain = ModelCudaGraphManager(vllm_config, device, mode, decode_query_len=1)

    def capture(self, model: nn.Module, model_state: TreeModelState, *inputs: Any, **options: Any) -> None:
        """Both kinds. While vLLM measures what a few of the largest graphs take, these alone."""
        super().capture(model, model_state, *inputs, **options)
        if self._max_full_descs_to_capture is None and self._plain.needs_capture():
            self._trees = model_state.trees
            with self._trees.without_candidates():
                self._plain.capture(model, model_state, *inputs, **options | {"progress_bar_desc": "Capturing more"})
            self._trees.plain_sizes = frozenset(self._plain.captured_token_counts())

    def run_fullgraph(self, desc: BatchExecutionDescriptor) -> Any:
        """The graph of the kind that the step's attention has been prepared for."""
        if self._trees is None or self._trees.step is not None:
            return super().run_fullgraph(desc)
        num_reqs = desc.num_tokens
        return self._plain.run_fullgraph(self._plain.dispatch(num_reqs, num_reqs, 1, desc.num_active_loras))

    def release_graphs(self) -> None:
        """Drop both kinds."""
        super().release_graphs()
        self._plain.release_graphs()
