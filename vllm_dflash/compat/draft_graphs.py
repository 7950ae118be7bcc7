# SPDX-License-Identifier: Apache-2.0
"""One FULL CUDA graph of the drafting step for each padded batch size."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from vllm_dflash.compat.capture_sizes import most_requests, request_counts

#: From a padded number of requests to the step over that many, ready to be captured.
PrepareStep = Callable[[int], Callable[[], None]]


class DraftGraphs(CudaGraphManager):
    """vLLM's graph manager over blocks of Q rows: every drafting step is a uniform batch."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        mode: CUDAGraphMode,
        num_query_rows: int,  # Q
        own_sizes: bool,  # a verification has another number of rows than a block
    ) -> None:
        config = copy.copy(vllm_config)
        if own_sizes:
            config.compilation_config = copy.copy(vllm_config.compilation_config)
            most = most_requests(vllm_config.scheduler_config, num_query_rows)
            sizes = [count * num_query_rows for count in request_counts(most)]
            config.compilation_config.cudagraph_capture_sizes = sizes
            config.compilation_config.max_cudagraph_capture_size = sizes[-1]
        config.speculative_config = copy.copy(vllm_config.speculative_config)
        # With a schedule of K over batch sizes, only verification changes its width: a block always has Q rows.
        config.speculative_config.num_speculative_tokens_per_batch_size = None
        super().__init__(config, device, mode, decode_query_len=num_query_rows)

    @property
    def most_requests(self) -> int:
        """Of the largest graph."""
        largest = self.compilation_config.max_cudagraph_capture_size // self.decode_query_len
        return int(min(largest, self.max_num_reqs))

    def capture_steps(self, prepare_step: PrepareStep) -> None:
        """Capture one graph for each batch size."""

        def create(desc: BatchExecutionDescriptor, warmup: bool) -> Callable[[CUDAGraphMode], None]:
            assert desc.num_reqs is not None and desc.num_tokens == desc.num_reqs * self.decode_query_len
            step = prepare_step(desc.num_reqs)
            return lambda mode: step()

        self.capture(create, progress_bar_desc="Capturing DFlash draft CUDA graphs")
