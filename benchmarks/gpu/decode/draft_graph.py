# SPDX-License-Identifier: Apache-2.0
"""The drafting step's CUDA graph, replayed by itself."""

from __future__ import annotations

from typing import Any

from gpu.engine_inside import drafter_of, model_runner
from gpu.names import Record


def time_draft_graph(llm: Any, requests: int) -> Record:
    """Milliseconds of one replay of the drafting step's graph for so many requests, and what it must read."""
    import torch
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    drafter = drafter_of(model_runner(llm))
    manager = next(value for value in vars(drafter).values() if isinstance(value, CudaGraphManager))
    desc = min((desc for desc in manager.graphs if desc.num_reqs >= requests), key=lambda desc: desc.num_reqs)
    buffers = [torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2)]
    copy_ms = replay_ms(lambda: buffers[0].copy_(buffers[1]), 10)
    return {
        "ms": replay_ms(manager.graphs[desc].replay, 50),
        "weight_bytes": draft_weight_bytes(drafter.model),
        "copy_bytes_per_second": 2 * (1 << 30) / copy_ms * 1000,
    }


def replay_ms(launch: Any, times: int) -> float:
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(3):
        launch()
    start.record()
    for _ in range(times):
        launch()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end) / times)


def draft_weight_bytes(model: Any) -> int:
    """Bytes of all matrices that a drafting step multiplies with: of an embedding table it reads a few rows only."""
    tensors = {name: tensor for name, tensor in model.named_parameters() if tensor.dim() == 2}
    stacked = getattr(getattr(model, "model", None), "_fused_kv_weight", None)  # vLLM's own keeps it as a plain tensor
    tensors |= {"stacked K/V": stacked} if stacked is not None else {}
    return sum(t.numel() * t.element_size() for name, t in tensors.items() if "embed_tokens" not in name)
