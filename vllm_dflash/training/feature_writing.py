# SPDX-License-Identifier: Apache-2.0
"""Writes a feature cache, or what an interrupted run left out of one. `feature_cache` tells the layout.

Letters: B sequences, S padded length, F tapped layers, H hidden size.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vllm_dflash.training.data import collate, target_features
from vllm_dflash.training.feature_cache import INDEX_FILE, TENSOR, FeatureCache, read_index, shard_file, shard_slice
from vllm_dflash.training.feature_plan import (
    DTYPE_NAMES,
    GIB,
    CachePlan,
    PlannedShard,
    cache_fingerprint,
    check_room,
    estimate_bytes,
    length_batches,
    planned_shards,
    readable,
    refuse_mismatch,
    shards_size,
)
from vllm_dflash.training.responses import Response

logger = logging.getLogger(__name__)
METADATA_KEY = "feature_cache"  # in a shard's header


def write_cache(
    folder: Path,
    target: nn.Module,
    responses: Sequence[Response],
    layer_ids: Sequence[int],
    *,
    max_length: int,
    dtype: torch.dtype = torch.bfloat16,
    target_dir: Path | str | None = None,
    budget: int | None = None,
    shard_bytes: int = GIB,
    batch_tokens: int = 16384,
    progress: Callable[[int, int], None] | None = None,
) -> FeatureCache:
    """Compute what is missing of the cache in `folder`, and open it. A complete one is opened right away.

    max_length: tokens at which a sequence is cut. dtype: the residual stream of a large target can exceed float16.
    target_dir: the target's files; None: where `from_pretrained` read them. budget: bytes; None: any size.
    shard_bytes: of a shard, at most, unless one batch has more. batch_tokens: padded tokens of a forward, at most,
    unless one sequence has more. progress(done, total): called with numbers of sequences after each forward.

    The last bits of a feature depend on the shape of its batch. So that an interrupted cache ends with the bytes of an
    uninterrupted one, shards of other `batch_tokens` or `shard_bytes` are computed again unless the cache is complete.

    Raises ValueError when the folder holds a cache of something else, when there is no room for this one (before
    anything is computed), and when the disk gets full all the same (a rerun goes on).
    """
    source = target.name_or_path if target_dir is None else target_dir
    fingerprint = cache_fingerprint(source, responses, layer_ids, max_length, dtype)
    complete = _complete_cache(folder, fingerprint)
    if complete is not None:
        return complete
    num_features = len(layer_ids) * target.config.get_text_config(decoder=True).hidden_size
    lengths = [min(len(response.sequence), max_length) for response in responses]
    needed = estimate_bytes(lengths, num_features, dtype)
    check_room(folder, needed, budget)
    batches = length_batches(lengths, batch_tokens)
    shards = planned_shards(batches, lengths, shard_bytes // (num_features * dtype.itemsize), fingerprint)
    plan = CachePlan(lengths, num_features, dtype, fingerprint, shards)

    def compute(members: Sequence[int]) -> Tensor:
        padded = max(1, lengths[members[0]])  # the longest; no target takes a batch of no tokens
        return _packed_features(target, [responses[i] for i in members], padded, layer_ids)

    try:
        _clear(folder, plan)
        _write_shards(folder, plan, compute, progress)
        _write_index(folder, plan)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"the disk is full: {readable(shards_size(folder))} of the feature cache in {folder} are written, and "
            f"{readable(needed)} are needed. Make room, and a rerun goes on from there"
        ) from error
    return FeatureCache.open(folder, fingerprint)


def _complete_cache(folder: Path, fingerprint: dict[str, Any]) -> FeatureCache | None:
    """The cache in `folder`, None when it is not complete or damaged. Raises ValueError when it is another one."""
    for file in sorted(folder.glob("shard-*.safetensors")):
        label = _shard_label(file)
        if label is not None:
            refuse_mismatch(folder, label["fingerprint"], fingerprint)
    if not (folder / INDEX_FILE).is_file():
        return None
    index = read_index(folder)
    refuse_mismatch(folder, index["fingerprint"], fingerprint)
    try:
        return FeatureCache(folder, index)
    except ValueError as error:
        logger.warning("%s; computing it again", error)
        return None


def _shard_label(file: Path) -> dict[str, Any] | None:
    """What a shard says of itself; None when it cannot be read."""
    try:
        metadata = safe_open(file, framework="pt").metadata()
    except SafetensorError:
        return None
    if METADATA_KEY not in (metadata or {}):
        raise ValueError(f"{file} is no shard of a feature cache: delete it")
    return json.loads(metadata[METADATA_KEY])


def _packed_features(
    target: nn.Module, responses: Sequence[Response], padded_length: int, layer_ids: Sequence[int]
) -> Tensor:
    """Features of a batch without its padding, sequences one after another: [rows, F*H], on the target's device."""
    batch = collate(responses, padded_length).to(next(target.parameters()).device)
    features = target_features(target, batch.token_ids, layer_ids)  # [B, S, F*H]
    columns = torch.arange(padded_length, device=features.device)
    return features[columns < batch.lengths[:, None]]


def _clear(folder: Path, plan: CachePlan) -> None:
    """Leave nothing in the folder but complete shards of the plan."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX_FILE).unlink(missing_ok=True)
    kept = {shard_file(folder, number): shard for number, shard in enumerate(plan.shards)}
    for partial in (*folder.glob("shard-*.safetensors.partial"), *folder.glob(f"{INDEX_FILE}.partial")):
        partial.unlink()
    for file in folder.glob("shard-*.safetensors"):
        if file not in kept or not _is_complete(file, kept[file], plan):
            file.unlink()


def _is_complete(file: Path, shard: PlannedShard, plan: CachePlan) -> bool:
    if _shard_label(file) != json.loads(shard.label):
        return False
    try:
        shard_slice(file, [shard.rows, plan.num_features], plan.dtype)
    except ValueError:
        return False
    return True


def _write_shards(
    folder: Path,
    plan: CachePlan,
    compute: Callable[[Sequence[int]], Tensor],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write the shards that are not in the folder yet."""
    done = 0
    for number, shard in enumerate(plan.shards):
        file = shard_file(folder, number)
        if file.exists():
            done += sum(map(len, shard.batches))
            continue
        with _appearing(file) as out:
            out.write(_header(shard, plan))
            for members in shard.batches:
                _write_rows(out, compute(members).to("cpu", plan.dtype))
                done += len(members)
                if progress is not None:
                    progress(done, len(plan.lengths))


def _header(shard: PlannedShard, plan: CachePlan) -> bytes:
    """The safetensors header of a shard. By hand: the library would want all of the tensor in memory."""
    shape = [shard.rows, plan.num_features]
    size = shard.rows * plan.num_features * plan.dtype.itemsize
    tensor = {"dtype": DTYPE_NAMES[plan.dtype], "shape": shape, "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": {METADATA_KEY: shard.label}, TENSOR: tensor}).encode()
    text += b" " * (-len(text) % 8)  # the tensor begins at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _write_rows(
    out: BinaryIO,
    rows: Tensor,  # [rows, F*H], on the CPU
) -> None:
    out.write(rows.contiguous().view(torch.uint8).numpy().data)


def _write_index(folder: Path, plan: CachePlan) -> None:
    places: list[list[int]] = [[] for _ in plan.lengths]  # of each sequence: shard, first row, rows
    for number, shard in enumerate(plan.shards):
        row = 0
        for index in itertools.chain.from_iterable(shard.batches):
            places[index] = [number, row, plan.lengths[index]]
            row += plan.lengths[index]
    index_text = json.dumps(
        {
            "fingerprint": plan.fingerprint,
            "num_features": plan.num_features,
            "shard_rows": [shard.rows for shard in plan.shards],
            "sequences": places,
        }
    )
    with _appearing(folder / INDEX_FILE) as out:
        out.write(index_text.encode())


@contextmanager
def _appearing(file: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name when it is complete and on the disk, and is removed after an error."""
    partial = file.with_name(file.name + ".partial")
    try:
        with partial.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
