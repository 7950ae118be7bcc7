# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tensors without loading them: safetensors headers, and a few kilobytes of each tensor's values."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

from vllm_dflash.doctor.facts import TensorFacts, Weights
from vllm_dflash.weight_files import TensorHeader, read_header, weight_files

#: Of each tensor so much is looked at, from its beginning, middle and end; small tensors are seen whole.
_SAMPLE_BYTES = 64 * 1024
_NUM_SAMPLES = 3
#: safetensors' float types that numpy reads as they are.
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def read_weights(directory: Path) -> Weights:
    """A directory's weights in safetensors. What cannot be read is named in `problems`."""
    files, problems = weight_files(directory)
    if not files and not problems:
        others = sorted(file.name for pattern in ("*.bin", "*.gguf", "*.pt") for file in directory.glob(pattern))
        beside = f", but {', '.join(others)}" if others else ""
        return Weights(problems=(f"no *.safetensors in {directory}{beside}",), has_headers=False)
    tensors: dict[str, TensorFacts] = {}
    for file in files:
        try:
            tensors |= _read_file(file)
        except ValueError as error:
            problems.append(str(error))
    return Weights(tensors, tuple(problems), has_headers=bool(tensors))


def _read_file(file: Path) -> dict[str, TensorFacts]:
    """Raises ValueError naming the file."""
    headers = read_header(file)
    try:
        with file.open("rb") as stream:
            return {name: _tensor(stream, header) for name, header in headers.items()}
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _tensor(stream: BinaryIO, header: TensorHeader) -> TensorFacts:
    samples = [_read(stream, start, stop - start) for start, stop in sample_ranges(header.begin, header.end)]
    return TensorFacts(
        shape=header.shape,
        dtype=header.dtype,
        num_bytes=header.end - header.begin,
        is_zero=not any(any(sample) for sample in samples),
        is_finite=all(_is_finite(sample, header.dtype) for sample in samples),
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
