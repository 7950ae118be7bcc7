# SPDX-License-Identifier: Apache-2.0
"""Which batch sizes get CUDA graphs.

Patch: `VllmConfig._set_cudagraph_sizes`. Reason: vLLM stops capturing at 512 rows (1024 on Blackwell), and a decode
step with drafts has K+1 rows a request, so that a batch of more than 32 requests at K=15 falls out of the graphs.
Added: an engine of ours captures up to max_num_seqs * (K+1) rows, unless the user chose sizes. Removable when vLLM's
default counts requests.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_dflash.compat import patching
from vllm_dflash.compat.ownership import draft_tree, drafts_here
from vllm_dflash.logs import logger

if TYPE_CHECKING:
    from vllm.config import CompilationConfig, SchedulerConfig, VllmConfig

#: Neighbouring sizes differ by at most 1/16: a batch between them is padded, and above some hundred rows each padding
#: row costs as much as a real one.
_FINENESS = 16
#: With trees of varying size, every eighth number of rows is captured up to this one.
_FINEST = 256
#: Above it every 64th, up to so many rows a request. Then, up to twice that, every 256th: more seldom pays, and what
#: pays there is a small target's step, which the host's launches would dominate without a graph. Not beyond so many
#: rows, which keep any target's GPU busy.
_ROWS_EACH, _COARSEST = 8, 4096


def install(config: ModuleType) -> None:
    """Patch `vllm.config.vllm`."""
    patching.replace(config.VllmConfig, "_set_cudagraph_sizes", set_cudagraph_sizes)


def set_cudagraph_sizes(self: VllmConfig) -> None:
    """vLLM's method, then the sizes up to a full batch of an engine of ours. Same signature."""
    from vllm.config import VllmConfig

    compilation = self.compilation_config
    chosen_by_user = (
        compilation.cudagraph_capture_sizes is not None or compilation.max_cudagraph_capture_size is not None
    )
    compile_sizes = compilation.compile_sizes
    patching.original(VllmConfig, "_set_cudagraph_sizes")(self)
    if chosen_by_user or not compilation.cudagraph_capture_sizes or not drafts_here(self):
        return
    shape = draft_tree(self)
    if shape is not None and shape.is_auto:
        _capture(compilation, varying_sizes(self.scheduler_config), compile_sizes)
        return
    scheduler, num_query_rows = self.scheduler_config, self.uniform_decode_query_len
    full_batch, limit = scheduler.max_num_seqs * num_query_rows, scheduler.max_num_batched_tokens
    if full_batch > limit:
        logger.warning(
            "vllm_dflash: a full batch of --max-num-seqs %d has %d rows (%d a request), more than "
            "--max-num-batched-tokens %d: steps of more than %d requests are not scheduled whole and run outside of "
            "CUDA graphs. Raise --max-num-batched-tokens or lower --max-num-seqs",
            scheduler.max_num_seqs, full_batch, num_query_rows, limit, limit // num_query_rows,
        )  # fmt: skip
    counts = request_counts(most_requests(scheduler, num_query_rows))
    _capture(compilation, {count * num_query_rows for count in counts}, compile_sizes)


def _capture(compilation: CompilationConfig, sizes: set[int], compile_sizes: Any) -> None:
    """These sizes too."""
    compilation.cudagraph_capture_sizes = sorted(sizes | set(compilation.cudagraph_capture_sizes or []))
    compilation.max_cudagraph_capture_size = compilation.cudagraph_capture_sizes[-1]
    compilation.compile_sizes = compile_sizes  # may name the capture sizes, which vLLM then spells out
    compilation.post_init_cudagraph_sizes()


def varying_sizes(scheduler: SchedulerConfig) -> set[int]:
    """Rows of steps that verify any number of nodes."""
    limit = scheduler.max_num_batched_tokens
    most = min(limit, max(_FINEST, _ROWS_EACH * scheduler.max_num_seqs))
    fine = set(range(8, min(most, _FINEST) + 1, 8)) | set(range(_FINEST, most + 1, 64))
    fine.add(min(limit, scheduler.max_num_seqs))  # a full batch that verifies nothing
    return fine | set(range(most, min(limit, 2 * most, _COARSEST) + 1, 256))


def most_requests(scheduler: SchedulerConfig, num_rows: int) -> int:
    """Of so many rows each in one step, for whose rows alone vLLM compiles a model."""
    return min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens // num_rows)


def request_counts(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: every one up to 32, 16 for each doubling from there, and the largest.

    Powers of two are among them, whose products fit the GPU's tiles. Example: 40 gives 1, 2, ..., 32, 34, 36, 38, 40.
    """
    counts, count = [], 1
    while count < max_num_seqs:
        counts.append(count)
        octave = 1 << (count.bit_length() - 1)  # the largest power of two up to count
        count += max(1, octave // _FINENESS)
    return [*counts, max_num_seqs]
