# SPDX-License-Identifier: Apache-2.0
"""Which batch sizes get CUDA graphs: on vLLM's real config, whose own choice is the reference for everyone else."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.engine.arg_utils import EngineArgs

from tests.helpers import target_config, write_config, write_drafter
from vllm_dflash.compat import capture_sizes, patching
from vllm_dflash.compat.capture_sizes import request_counts
from vllm_dflash.logs import logger

K = 15
ROWS = 16  # of a request: the anchor and K drafts


# Batch sizes.


@pytest.mark.parametrize(
    ("max_num_seqs", "expected"),
    [
        (1, [1]),
        (2, [1, 2]),
        (5, [1, 2, 3, 4, 5]),
        (32, list(range(1, 33))),
        (33, [*range(1, 33), 33]),
        (40, [*range(1, 33), 34, 36, 38, 40]),
        (41, [*range(1, 33), 34, 36, 38, 40, 41]),
        (64, [*range(1, 33), 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62, 64]),
        (90, [*range(1, 33), *range(34, 64, 2), 64, 68, 72, 76, 80, 84, 88, 90]),
    ],
)
def test_request_counts(max_num_seqs: int, expected: list[int]) -> None:
    assert request_counts(max_num_seqs) == expected


def test_neighbouring_counts_are_within_a_sixteenth() -> None:
    for max_num_seqs in (*range(1, 300), 512, 1000, 1024):
        counts = request_counts(max_num_seqs)
        assert counts == sorted(set(counts))
        assert (counts[0], counts[-1]) == (1, max_num_seqs)
        steps = zip(counts, counts[1:], strict=False)
        assert all(after - before == 1 or 16 * (after - before) <= before for before, after in steps)


def test_powers_of_two_are_captured() -> None:
    assert {1, 2, 4, 8, 16, 32, 64, 128, 256, 512} <= set(request_counts(1000))


def test_large_batches_need_few_graphs() -> None:
    """Each costs time and memory: 32, then at most 16 for every doubling, and the largest."""
    assert len(request_counts(1024)) <= 32 + 5 * 16 + 1


# vLLM's config.


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_config(tmp_path_factory.mktemp("target"), target_config()))


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_drafter(tmp_path_factory.mktemp("drafter")))


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What the plugin warns of. vLLM's loggers do not propagate, so caplog would not see it."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield texts
    logger.removeHandler(handler)


def graphs_wanted(target: str, speculative: dict[str, Any] | None, **arguments: Any) -> VllmConfig:
    """An engine's config as it is when CUDA graph sizes are chosen. A CPU has none, so that is undone."""
    args = EngineArgs(
        model=target,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        speculative_config=speculative,
        **{"max_num_batched_tokens": 8192} | arguments,
    )
    config = args.create_engine_config()
    compilation = config.compilation_config
    compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    compilation.cudagraph_capture_sizes = compilation.max_cudagraph_capture_size = None
    compilation.compile_sizes = None
    return config


def ours(drafter: str) -> dict[str, Any]:
    return {"method": "dflash", "model": drafter}


OTHERS = {"method": "ngram", "num_speculative_tokens": K, "prompt_lookup_max": 4}


def chosen(config: VllmConfig) -> list[int]:
    """Sizes chosen, after a check that what vLLM derives from them agrees."""
    config._set_cudagraph_sizes()
    compilation = config.compilation_config
    assert compilation.max_cudagraph_capture_size == max(compilation.cudagraph_capture_sizes, default=0)
    return list(compilation.cudagraph_capture_sizes)


def vllms_choice(config: VllmConfig) -> list[int]:
    """Of the same config, by vLLM's own method; the config is left as it was."""
    compilation = config.compilation_config
    keys = ("cudagraph_capture_sizes", "max_cudagraph_capture_size", "compile_sizes")
    before = {key: getattr(compilation, key) for key in keys}
    patching.original(VllmConfig, "_set_cudagraph_sizes")(config)
    sizes = list(compilation.cudagraph_capture_sizes)
    for key, value in before.items():
        setattr(compilation, key, value)
    return sizes


def test_the_method_is_patched(target: str) -> None:
    graphs_wanted(target, None)  # loads the plugin, as for any user
    assert VllmConfig._set_cudagraph_sizes is capture_sizes.set_cudagraph_sizes


def test_vllm_stops_before_a_full_batch(target: str, drafter: str) -> None:
    """The reason for the patch. If this fails, vLLM counts requests and the patch can go."""
    assert max(vllms_choice(graphs_wanted(target, ours(drafter), max_num_seqs=128))) < 128 * ROWS


@pytest.mark.parametrize("max_num_seqs", [1, 20, 40, 128])
def test_an_engine_of_ours_captures_up_to_a_full_batch(
    target: str, drafter: str, max_num_seqs: int, warnings: list[str]
) -> None:
    config = graphs_wanted(target, ours(drafter), max_num_seqs=max_num_seqs)
    theirs, sizes = vllms_choice(config), chosen(config)
    assert set(theirs) <= set(sizes)
    assert {count * ROWS for count in request_counts(max_num_seqs)} <= set(sizes)
    assert max(sizes) == max(max_num_seqs * ROWS, *theirs)
    assert sizes == sorted(set(sizes))
    assert warnings == []


@pytest.mark.parametrize(
    ("max_num_seqs", "limit", "expected"),
    [
        (8, 8192, [*range(8, 257, 8), 512]),
        (64, 8192, [*range(8, 257, 8), 320, 384, 448, 512, 768, 1024]),
        (100, 8192, [*range(8, 97, 8), 100, *range(104, 257, 8), *range(320, 769, 64), 800, 1056, 1312, 1568]),
        (256, 2304, [*range(8, 257, 8), *range(320, 2049, 64), 2304]),
    ],
)
def test_where_the_number_of_nodes_varies(max_num_seqs: int, limit: int, expected: list[int]) -> None:
    scheduler = SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=limit)
    assert sorted(capture_sizes.varying_sizes(scheduler)) == expected


def test_compile_sizes_follow_the_capture_sizes(target: str, drafter: str) -> None:
    config = graphs_wanted(target, ours(drafter), max_num_seqs=64)
    config.compilation_config.compile_sizes = [3, "cudagraph_capture_sizes"]
    sizes = chosen(config)
    assert sorted(config.compilation_config.compile_sizes) == sorted([3, *sizes])


@pytest.mark.parametrize("speculative", [None, OTHERS], ids=["no speculation", "ngram"])
def test_engines_of_others_are_left_alone(target: str, speculative: dict[str, Any] | None) -> None:
    config = graphs_wanted(target, speculative, max_num_seqs=128)
    theirs = vllms_choice(config)
    assert chosen(config) == theirs


def test_sizes_of_the_user_are_kept(target: str, drafter: str) -> None:
    config = graphs_wanted(target, ours(drafter), max_num_seqs=128)
    config.compilation_config.cudagraph_capture_sizes = [16, 48]
    assert chosen(config) == [16, 48]


def test_a_largest_size_of_the_user_is_kept(target: str, drafter: str) -> None:
    config = graphs_wanted(target, ours(drafter), max_num_seqs=128)
    config.compilation_config.max_cudagraph_capture_size = 96
    theirs = vllms_choice(config)
    assert chosen(config) == theirs
    assert max(theirs) == 96


def test_without_graphs_there_are_no_sizes(target: str, drafter: str) -> None:
    config = graphs_wanted(target, ours(drafter), max_num_seqs=128)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    assert chosen(config) == []


def test_a_full_batch_that_is_never_scheduled_whole(target: str, drafter: str, warnings: list[str]) -> None:
    """1000 rows are 62 requests and 8 rows."""
    sizes = chosen(graphs_wanted(target, ours(drafter), max_num_seqs=128, max_num_batched_tokens=1000))
    assert {count * ROWS for count in [*range(1, 33), 48, 50, 60, 62]} <= set(sizes)
    assert max(sizes) == 62 * ROWS
    (warning,) = warnings
    assert "--max-num-seqs 128 has 2048 rows (16 a request)" in warning
    assert "--max-num-batched-tokens 1000" in warning
    assert "more than 62 requests" in warning


def test_the_least_that_vllm_accepts(target: str, drafter: str, warnings: list[str]) -> None:
    config = graphs_wanted(target, ours(drafter), max_num_seqs=4, max_num_batched_tokens=ROWS)
    assert chosen(config) == [1, 2, 4, 8, ROWS]
    assert "more than 1 requests" in warnings[0]
