# SPDX-License-Identifier: Apache-2.0
"""The target's features on disk: computed once, read at every epoch.

A cache folder holds `shard-00000.safetensors` and so on, each with one tensor `features` [rows, F*H] in which sequences
lie one after another without padding, and `index.json`: what the cache was made of, and where each sequence lies.
Every shard says in its own header what it was made of and gets its name only when it is complete, and the index is
written last. So a kill at any time leaves nothing that passes for complete, and a rerun keeps the shards that are.
One process writes a folder at a time.

Letters: B sequences, S tokens of a sequence (padded ones in a batch), F tapped layers, H hidden size.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vllm_dflash.training.data import collate, target_features
from vllm_dflash.training.origin import hash_of
from vllm_dflash.training.responses import Response

logger = logging.getLogger(__name__)

INDEX_FILE = "index.json"
TENSOR = "features"
METADATA_KEY = "feature_cache"
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
        "responses": _responses_hash(responses),
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


def _responses_hash(responses: Sequence[Response]) -> str:
    """Of the token ids alone: where the prompt ends and at what temperature it went on changes no feature."""
    return hash_of([response.prompt_token_ids + response.token_ids for response in responses])


def _refuse_mismatch(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
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
    elif needed > free + _shards_size(folder):
        excess = "more than the disk has left"
    else:
        return
    allowed = "no budget is set" if budget is None else f"the budget is {_readable(budget)}"
    raise ValueError(
        f"the features would take {_readable(needed)} in {folder}, {excess}: {allowed}, {_readable(free)} are free. "
        "Raise data.feature_cache_gb in the recipe, choose an --output on another disk, "
        "or train without a cache: features are then computed at every step"
    )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _shards_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("shard-*.safetensors"))


def _readable(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB // 100 else f"{size} bytes"


# ---- Reading ----


class FeatureCache:
    """Features of a complete cache folder, by the number of the response they belong to.

    Shards are mapped into memory: only what is asked for is read from the disk.
    """

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder = folder
        self.dtype: torch.dtype = getattr(torch, index["fingerprint"]["dtype"])
        self.num_features: int = index["num_features"]  # F*H
        self._places: list[list[int]] = index["sequences"]  # of each: shard, first row, rows
        self._shards = [
            _shard_slice(_shard_file(folder, number), [rows, self.num_features], self.dtype)
            for number, rows in enumerate(index["shard_rows"])
        ]

    @classmethod
    def open(cls, folder: Path, fingerprint: dict[str, Any]) -> FeatureCache:
        """Open the cache in `folder`, which has to be complete and of this `cache_fingerprint`.

        Raises ValueError naming what differs, or the file that is missing, truncated or of another shape.
        """
        index = _read_index(folder)
        _refuse_mismatch(folder, index["fingerprint"], fingerprint)
        return cls(folder, index)

    def __len__(self) -> int:
        return len(self._places)

    def length(self, index: int) -> int:
        """Tokens of sequence `index`, after it was cut."""
        return self._places[index][2]

    def features(self, index: int) -> Tensor:
        """Features of sequence `index`: [S, F*H], on the CPU. A copy: it may be changed."""
        return self._mapped(index, self.length(index)).clone()

    def batch(self, indices: Sequence[int], padded_length: int) -> Tensor:
        """Features of several sequences, cut at `padded_length` or padded with zeros: [B, padded_length, F*H]."""
        padded = torch.zeros(len(indices), padded_length, self.num_features, dtype=self.dtype)
        for row, index in enumerate(indices):
            length = min(self.length(index), padded_length)
            padded[row, :length] = self._mapped(index, length)
        return padded

    def _mapped(self, index: int, length: int) -> Tensor:
        """The first `length` rows of a sequence, [length, F*H], as they lie in the file."""
        shard, start, _ = self._places[index]
        return self._shards[shard][start : start + length]


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX_FILE
    if not file.is_file():
        raise ValueError(f"{folder} holds no complete feature cache: there is no {INDEX_FILE}")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it, and a rerun writes it again") from error
    if not isinstance(index, dict) or not index.keys() >= {"fingerprint", "num_features", "shard_rows", "sequences"}:
        raise ValueError(f"{file} is not the index of a feature cache")
    return index


def _shard_file(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _shard_slice(file: Path, shape: list[int], dtype: torch.dtype) -> Any:
    """The tensor of a shard, still on the disk. Raises ValueError naming the file when it is not as it should be."""
    try:
        tensor = safe_open(file, framework="pt").get_slice(TENSOR)
    except FileNotFoundError as error:
        raise ValueError(f"{file} of the feature cache is missing") from error
    except SafetensorError as error:  # safetensors compares the header with the length of the file
        raise ValueError(f"{file} is truncated or no shard of a feature cache ({error})") from error
    found, wanted = (tensor.get_shape(), tensor.get_dtype()), (shape, DTYPE_NAMES[dtype])
    if found != wanted:
        raise ValueError(f"{file} holds features {found[0]} in {found[1]}, not {wanted[0]} in {wanted[1]}")
    return tensor


# ---- Writing ----


@dataclass(frozen=True)
class _Shard:
    """A shard to be: the sequences of each forward of the target, in the order in which they are written."""

    batches: list[list[int]]
    rows: int
    label: str  # in its header: what it is made of, and in which batches


@dataclass(frozen=True)
class _Plan:
    lengths: list[int]  # of the sequences, cut
    num_features: int
    dtype: torch.dtype
    fingerprint: dict[str, Any]
    shards: list[_Shard]


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
    lengths = [min(len(response.prompt_token_ids) + len(response.token_ids), max_length) for response in responses]
    needed = estimate_bytes(lengths, num_features, dtype)
    check_room(folder, needed, budget)
    batches = _length_batches(lengths, batch_tokens)
    shards = _shards(batches, lengths, shard_bytes // (num_features * dtype.itemsize), fingerprint)
    plan = _Plan(lengths, num_features, dtype, fingerprint, shards)

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
            f"the disk is full: {_readable(_shards_size(folder))} of the feature cache in {folder} are written, and "
            f"{_readable(needed)} are needed. Make room, and a rerun goes on from there"
        ) from error
    return FeatureCache.open(folder, fingerprint)


def _complete_cache(folder: Path, fingerprint: dict[str, Any]) -> FeatureCache | None:
    """The cache in `folder`, None when it is not complete or damaged. Raises ValueError when it is another one."""
    for file in sorted(folder.glob("shard-*.safetensors")):
        label = _shard_label(file)
        if label is not None:
            _refuse_mismatch(folder, label["fingerprint"], fingerprint)
    if not (folder / INDEX_FILE).is_file():
        return None
    index = _read_index(folder)
    _refuse_mismatch(folder, index["fingerprint"], fingerprint)
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


def _length_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Sequences of about one length together: little padding. Longest first: what does not fit in memory fails soon."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def _shards(
    batches: Sequence[list[int]], lengths: Sequence[int], max_rows: int, fingerprint: dict[str, Any]
) -> list[_Shard]:
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
        _Shard(group, sum(lengths[i] for batch in group for i in batch), _label(group, fingerprint)) for group in groups
    ]


def _label(batches: list[list[int]], fingerprint: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(batches).encode()).hexdigest()
    return json.dumps({"fingerprint": fingerprint, "batches": digest}, sort_keys=True)


def _packed_features(
    target: nn.Module, responses: Sequence[Response], padded_length: int, layer_ids: Sequence[int]
) -> Tensor:
    """Features of a batch without its padding, sequences one after another: [rows, F*H], on the target's device."""
    batch = collate(responses, padded_length).to(next(target.parameters()).device)
    features = target_features(target, batch.token_ids, layer_ids)  # [B, S, F*H]
    columns = torch.arange(padded_length, device=features.device)
    return features[columns < batch.lengths[:, None]]


def _clear(folder: Path, plan: _Plan) -> None:
    """Leave nothing in the folder but complete shards of the plan."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX_FILE).unlink(missing_ok=True)
    kept = {_shard_file(folder, number): shard for number, shard in enumerate(plan.shards)}
    for partial in (*folder.glob("shard-*.safetensors.partial"), *folder.glob(f"{INDEX_FILE}.partial")):
        partial.unlink()
    for file in folder.glob("shard-*.safetensors"):
        if file not in kept or not _is_complete(file, kept[file], plan):
            file.unlink()


def _is_complete(file: Path, shard: _Shard, plan: _Plan) -> bool:
    if _shard_label(file) != json.loads(shard.label):
        return False
    try:
        _shard_slice(file, [shard.rows, plan.num_features], plan.dtype)
    except ValueError:
        return False
    return True


def _write_shards(
    folder: Path,
    plan: _Plan,
    compute: Callable[[Sequence[int]], Tensor],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write the shards that are not in the folder yet."""
    done = 0
    for number, shard in enumerate(plan.shards):
        file = _shard_file(folder, number)
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


def _header(shard: _Shard, plan: _Plan) -> bytes:
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


def _write_index(folder: Path, plan: _Plan) -> None:
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
