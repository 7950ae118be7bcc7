# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tensors without loading them: safetensors headers, and a few kilobytes of each tensor's values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from vllm_dflash.doctor.facts import TensorFacts, Weights

#: Of each tensor so much is looked at, from its beginning, middle and end; small tensors are seen whole.
_SAMPLE_BYTES = 64 * 1024
_NUM_SAMPLES = 3
#: safetensors' float types that numpy reads as they are.
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_INDEX = "model.safetensors.index.json"


def read_weights(directory: Path) -> Weights:
    """All safetensors of a directory. What cannot be read is named in `problems`."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        others = sorted(file.name for pattern in ("*.bin", "*.gguf", "*.pt") for file in directory.glob(pattern))
        beside = f", but {', '.join(others)}" if others else ""
        return Weights(problems=(f"no *.safetensors in {directory}{beside}",), has_headers=False)
    tensors: dict[str, TensorFacts] = {}
    problems = _missing_shards(directory)
    for file in files:
        try:
            tensors |= _read_file(file)
        except ValueError as error:
            problems.append(str(error))
    return Weights(tensors, tuple(problems), has_headers=bool(tensors))


def _missing_shards(directory: Path) -> list[str]:
    """Files that the index of a sharded checkpoint names and that are not there."""
    index = directory / _INDEX
    if not index.is_file():
        return []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{index} is not an index of safetensors files: {error!r}"]
    missing = sorted(str(name) for name in names if not (directory / str(name)).is_file())
    return [f"{index} names files that are not there: {', '.join(missing)}"] if missing else []


def _read_file(file: Path) -> dict[str, TensorFacts]:
    """Raises ValueError naming the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):  # the library checks the header against the file's size
            pass
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(size))
            header.pop("__metadata__", None)
            return {name: _tensor(stream, 8 + size, entry) for name, entry in header.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a readable safetensors file (truncated download?): {error}") from error


def _tensor(stream: BinaryIO, data: int, entry: Mapping[str, Any]) -> TensorFacts:
    """One tensor of a file whose tensor data begin at byte `data`."""
    begin, end = entry["data_offsets"]
    samples = [_read(stream, data + start, stop - start) for start, stop in sample_ranges(begin, end)]
    return TensorFacts(
        shape=tuple(entry["shape"]),
        dtype=entry["dtype"],
        num_bytes=end - begin,
        is_zero=not any(any(sample) for sample in samples),
        is_finite=all(_is_finite(sample, entry["dtype"]) for sample in samples),
        digest=hashlib.sha256(b"".join(samples)).hexdigest(),
    )


def sample_ranges(begin: int, end: int) -> list[tuple[int, int]]:
    """Byte ranges of a tensor's bytes [begin, end) to look at."""
    if end - begin <= _NUM_SAMPLES * _SAMPLE_BYTES:
        return [(begin, end)]
    # A multiple of 8 bytes from the beginning, so that no value is cut.
    middle = begin + (end - begin - _SAMPLE_BYTES) // 2 // 8 * 8
    return [(start, start + _SAMPLE_BYTES) for start in (begin, middle, end - _SAMPLE_BYTES)]


def _read(stream: BinaryIO, start: int, size: int) -> bytes:
    stream.seek(start)
    return stream.read(size)


def _is_finite(sample: bytes, dtype: str) -> bool:
    """Whether no value is NaN or infinite. True for types that cannot be, or that are packed."""
    import numpy as np

    if dtype == "BF16":  # the upper half of a float32
        values = (np.frombuffer(sample, dtype="<u2").astype("<u4") << 16).view("<f4")
    elif dtype in _FLOATS:
        values = np.frombuffer(sample, dtype=_FLOATS[dtype])
    else:
        return True
    return bool(np.isfinite(values).all())
