# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Programmatic dependent launch: a kernel starts on the SMs that its predecessor leaves, and waits before it reads.

Why it is safe. A kernel here may touch, before it waits, only what no kernel writes: weights. `wait_for_predecessor`
returns when the kernel before has completed and its writes are visible. Every kernel here waits in every program before
it ends, and kernels of others, launched without the attribute, start after their predecessor has completed: so by
induction the wait covers all earlier kernels of the stream, not only the last. That settles reads after writes, and
also writes over what an earlier kernel still reads: nothing is written before the wait, and behind it no earlier kernel
runs any more. A kernel that returns without waiting, or writes before it, would break this for those that follow.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from vllm.triton_utils import tl, triton


@cache
def supports_pdl(device: torch.device) -> bool:
    """Whether kernels on this device may be launched before their predecessor has ended (Hopper and later)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return bool(torch.cuda.get_device_capability(device)[0] >= 9)


def pdl_options(use_pdl: bool | None, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a launch. `use_pdl` None: wherever the device supports it."""
    if supports_pdl(device) and use_pdl is not False:
        return {"USE_PDL": True, "launch_pdl": True}
    return {"USE_PDL": False}


@triton.jit
def release_successor():
    """Let the next kernel start wherever this one leaves room: only a hint, since the next one waits for our end."""
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_predecessor():
    """Return when all earlier kernels have completed and their writes can be read."""
    tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch_to_l2(
    pointers,  # 16-byte aligned
    BYTES: tl.constexpr,  # at each of them; a multiple of 16
):
    """Have BYTES at each pointer on their way to L2. They must be memory that can be read."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
        "=r,l,r",
        [pointers.to(tl.int64), tl.full(pointers.shape, BYTES, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
