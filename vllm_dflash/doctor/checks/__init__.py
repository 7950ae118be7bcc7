# SPDX-License-Identifier: Apache-2.0
"""The checks, one file a theme. Each is a function of the facts and yields what it found; none knows another."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vllm_dflash.doctor.checks.engine import check_target_architecture, check_version
from vllm_dflash.doctor.checks.kind import check_config_keys, check_kind
from vllm_dflash.doctor.checks.layers import check_target_layers
from vllm_dflash.doctor.checks.lengths import check_block_size, check_context_length
from vllm_dflash.doctor.checks.mask_token import check_mask_token
from vllm_dflash.doctor.checks.memory import check_memory, check_tensor_parallel
from vllm_dflash.doctor.checks.pair import check_identity, check_pair
from vllm_dflash.doctor.checks.precision import check_dtype, check_kv_cache_dtype, check_quantization
from vllm_dflash.doctor.checks.rope import check_rope
from vllm_dflash.doctor.checks.tables import check_tables
from vllm_dflash.doctor.checks.template import check_templates
from vllm_dflash.doctor.checks.tensors import check_drafter_tensors, check_target_weights
from vllm_dflash.doctor.checks.windows import check_prefix_cache, check_windows
from vllm_dflash.doctor.facts import Facts
from vllm_dflash.doctor.finding import Finding

Check = Callable[[Facts], Iterator[Finding]]

#: In the order of the report: what the pair is, whether it fits, how it will run.
ALL: tuple[Check, ...] = (
    check_version,
    check_target_architecture,
    check_kind,
    check_config_keys,
    check_drafter_tensors,
    check_target_weights,
    check_pair,
    check_identity,
    check_target_layers,
    check_mask_token,
    check_tables,
    check_rope,
    check_windows,
    check_block_size,
    check_context_length,
    check_dtype,
    check_quantization,
    check_kv_cache_dtype,
    check_tensor_parallel,
    check_memory,
    check_prefix_cache,
    check_templates,
)


def run_checks(facts: Facts) -> list[Finding]:
    """Every check's findings."""
    return [finding for check in ALL for finding in check(facts)]
