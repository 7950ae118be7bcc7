# SPDX-License-Identifier: Apache-2.0
"""vLLM's rejection sampler on a CPU, at temperature > 0.

Patch: `expand_batch_to_tokens` in `vllm.v1.sample.rejection_sampler`, on the CPU platform only. Symptom: with any
speculative method, outputs do not follow the target's distribution. Cause: the CPU stand-in of `expand_kernel` writes
to an int64 copy of its output, so the per-token temperature, top_k and top_p are uninitialised memory. Added: the same
expansion in torch. Removable when the CPU build's expand_kernel writes to its output.
"""

from __future__ import annotations

from types import ModuleType

import torch

from vllm_dflash.compat import patching


def install(rejection_sampler: ModuleType) -> None:
    """Patch `vllm.v1.sample.rejection_sampler` where it runs on a CPU."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        patching.replace(rejection_sampler, "expand_batch_to_tokens", expand_batch_to_tokens)


def expand_batch_to_tokens(
    x: torch.Tensor,  # [R]
    cu_num_tokens: torch.Tensor,  # [R] running total of draft tokens
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """Each request's value for each of its draft tokens, [num_tokens]; `replace_from` becomes `replace_to`.

    Same signature as vLLM's. Example: x = [a, b], cu_num_tokens = [2, 3] gives [a, a, b].
    """
    x = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    rows = torch.arange(num_tokens, device=x.device)
    return x[torch.searchsorted(cu_num_tokens.contiguous(), rows, right=True)]
