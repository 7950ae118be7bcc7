# SPDX-License-Identifier: Apache-2.0
"""The engine core's check of all its workers, when they are there and before they serve.

Patch: `Executor.__init__` in `vllm.v1.executor.abstract`. Reason: vLLM starts workers that lack a plugin, wherever they
are, and these do without. Added: an engine of ours asks each worker what it has, by a function that needs nothing of
this package there; and where a worker failed for want of this package, the error says so. Removable when vLLM compares
its processes' plugins.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_dflash.compat import patching
from vllm_dflash.compat.ownership import claimed_by
from vllm_dflash.compat.workers.facts import ProcessFacts, check_all, complaint, install_advice, make_probe

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.executor.abstract import Executor

_MISSING = re.compile(r"No module named '(vllm_dflash(?:\.[\w.]+)?)'")
_ADDRESS = re.compile(r"\bip=([\w.:]+)")


def install(abstract: ModuleType) -> None:
    """Patch `vllm.v1.executor.abstract`."""
    make = abstract.Executor.__init__

    def init(self: Executor, vllm_config: VllmConfig) -> None:
        """vLLM's method, with the check for our engines. Same signature."""
        wanted = claimed_by(vllm_config.speculative_config)
        if wanted is None:
            return make(self, vllm_config)
        try:
            make(self, vllm_config)
        except Exception as error:
            reason = _missing_package(error, wanted)
            if reason is None:
                raise
            raise RuntimeError(complaint(reason)) from error
        _check(self, vllm_config, wanted)

    patching.replace(abstract.Executor, "__init__", init)


def _check(executor: Any, vllm_config: VllmConfig, wanted: str) -> None:
    if vllm_config.parallel_config.node_rank_within_dp > 0:
        return  # of several nodes without Ray, the first one's executor reaches all workers, the others' none
    probe = make_probe()
    try:
        answers = [probe(None), *executor.collective_rpc(probe)]
        check_all([ProcessFacts(**answer) for answer in answers], wanted)
    except Exception:  # whatever it is, no worker stays
        executor.shutdown()
        raise


def _missing_package(error: BaseException, wanted: str) -> str | None:
    """What a failed start has to do with this package missing in a worker; None: nothing."""
    for text in map(str, _causes(error)):
        missing, address = _MISSING.search(text), _ADDRESS.search(text)
        if missing:
            where = f"a worker on {address[1]}" if address else "a worker"
            return f"{where} has no module {missing[1]} (not installed, or another version); {install_advice(wanted)}"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
