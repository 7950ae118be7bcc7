# SPDX-License-Identifier: Apache-2.0
"""A worker's own check, before it loads anything. For workers that Ray places: their environments may differ.

vLLM adds the class that `parallel_config.worker_extension_cls` names to the bases of its worker class. Where this
package is not installed, that name cannot be imported, and the worker fails there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_dflash.compat.ownership import claimed_by
from vllm_dflash.compat.workers.facts import ProcessFacts, check_all, make_probe

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig


class CheckedWorker:
    """Lets no worker of an engine of ours be made in a process that would not draft with this plugin."""

    def __new__(cls, *args: Any, vllm_config: VllmConfig, rank: int, **kwargs: Any) -> CheckedWorker:
        # The class stays among the bases for other engines of the process, too.
        wanted = claimed_by(vllm_config.speculative_config)
        if wanted is not None:
            facts = ProcessFacts(**make_probe()(None))
            check_all([facts._replace(rank=rank)], wanted)
        return super().__new__(cls)


def arrange_check(parallel: ParallelConfig) -> None:
    """Have the workers of an engine of ours check themselves, if Ray places them and the user has no class there."""
    if (parallel.use_ray or parallel.data_parallel_backend == "ray") and not parallel.worker_extension_cls:
        parallel.worker_extension_cls = f"{CheckedWorker.__module__}.{CheckedWorker.__qualname__}"
