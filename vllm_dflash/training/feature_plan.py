# SPDX-License-Identifier: Apache-2.0
"""What a feature cache is to hold, before any of it is written: made of what, how large, in which shards."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_dflash.training.origin import responses_hash
from vllm_dflash.training.responses import Response

DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # as safetensors has them
SAMPLES, SAMPLE_BYTES = 16, 4096  # of each weight file, for the fingerprint
GIB = 1 << 30
DIFFERENCES = {
    "target": "target folder",
    "target_config": "config.json of the target",
    "target_weights": "weights of the target",
    "layer_ids": "tapped layers",
    "max_length": "longest sequence",
    "dtype": "dtype",
    "responses": "responses",
}
HASHED = ("target_config", "target_weights", "responses")  # their values tell a reader nothing


# ---- What a cache is made of ----


def cache_fingerprint(
    target_dir: Path | str, responses: Sequence[Response], layer_ids: Sequence[int], max_length: int, dtype: torch.dtype
) -> dict[str, Any]:
    """What the features depend on, as JSON values. Equal fingerprints: the same features.

    Weights are known by the names and sizes of their files and by samples of their bytes: reading all of them would
    take minutes, and another training of the same architecture has files of the same size.
    Raises ValueError when `target_dir` is not a folder with config.json and safetensors, or for another dtype than
    bfloat16, float16 and float32.
    """
    folder = Path(target_dir).resolve()
    if not (folder / "config.json").is_file():
        raise ValueError(f"{target_dir} is not the folder of a model: it has no config.json")
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"features cannot be kept as {dtype}: use one of {', '.join(map(str, DTYPE_NAMES))}")
    return {
        "target": str(folder),
        "target_config": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        "target_weights": _weights_hash(folder),
        "layer_ids": [int(layer) for layer in layer_ids],
        "max_length": max_length,
        "dtype": str(dtype).removeprefix("torch."),
        "responses": responses_hash(responses),
    }


def _weights_hash(target_dir: Path) -> str:
    files = sorted(target_dir.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{target_dir} has no safetensors files")
    digest = hashlib.sha256()
    for index in sorted(target_dir.glob("*.safetensors.index.json")):
        digest.update(index.read_bytes())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with file.open("rb") as weights:
            for sample in range(SAMPLES):
                weights.seek(size * sample // SAMPLES)
                digest.update(weights.read(SAMPLE_BYTES))
    return digest.hexdigest()


def refuse_mismatch(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ValueError naming what differs between the `cache_fingerprint` found in `folder` and the one wanted."""
    differing = [key for key in DIFFERENCES if found.get(key) != wanted[key]]
    if differing:
        what = ", ".join(
            DIFFERENCES[key] if key in HASHED else f"{DIFFERENCES[key]} ({found.get(key)}, now {wanted[key]})"
            for key in differing
        )
        raise ValueError(
            f"the feature cache in {folder} was made of something else: {what} differ. "
            "Delete the folder, or choose another --output"
        )


# ---- Room ----


def estimate_bytes(lengths: Sequence[int], num_features: int, dtype: torch.dtype) -> int:
    """Bytes of the features of sequences of so many tokens. num_features: F*H, values of a token."""
    return sum(lengths) * num_features * dtype.itemsize


def check_room(folder: Path, needed: int, budget: int | None) -> None:
    """Raise ValueError when a cache of `needed` bytes exceeds `budget` bytes (None: any size) or the free disk.

    Shards that an interrupted run left in `folder` are a part of the cache, so their room counts as free.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if budget is not None and needed > budget:
        excess = "more than its budget"
    elif needed > free + shards_size(folder):
        excess = "more than the disk has left"
    else:
        return
    allowed = "no budget is set" if budget is None else f"the budget is {readable(budget)}"
    raise ValueError(
        f"the features would take {readable(needed)} in {folder}, {excess}: {allowed}, {readable(free)} are free. "
        "Raise data.feature_cache_gb in the recipe, choose an --output on another disk, "
        "or train without a cache: features are then computed at every step"
    )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def shards_size(folder: Path) -> int:
    """Bytes of the whole shards in `folder`."""
    return sum(file.stat().st_size for file in folder.glob("shard-*.safetensors"))


def readable(size: int) -> str:
    """A number of bytes, for messages."""
    return f"{size / GIB:.2f} GiB" if size >= GIB // 100 else f"{size} bytes"


# ---- Shards ----


@dataclass(frozen=True)
class PlannedShard:
    """The sequences of each forward of the target, in the order in which they are written."""

    batches: list[list[int]]
    rows: int
    label: str  # in its header: what it is made of, and in which batches


@dataclass(frozen=True)
class CachePlan:
    """All that is to be written."""

    lengths: list[int]  # of the sequences, cut
    num_features: int  # F*H, values of a token
    dtype: torch.dtype
    fingerprint: dict[str, Any]
    shards: list[PlannedShard]


def length_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Sequences of about one length together: little padding. Longest first: what does not fit in memory fails soon."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def planned_shards(
    batches: Sequence[list[int]], lengths: Sequence[int], max_rows: int, fingerprint: dict[str, Any]
) -> list[PlannedShard]:
    """Whole batches, so that a shard can be computed again by itself."""
    groups: list[list[list[int]]] = []
    room = 0
    for batch in batches:
        rows = sum(lengths[i] for i in batch)
        if not groups or rows > room:
            groups.append([])
            room = max_rows
        groups[-1].append(batch)
        room -= rows
    return [
        PlannedShard(group, sum(lengths[i] for batch in group for i in batch), _label(group, fingerprint))
        for group in groups
    ]


def _label(batches: list[list[int]], fingerprint: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(batches).encode()).hexdigest()
    return json.dumps({"fingerprint": fingerprint, "batches": digest}, sort_keys=True)
