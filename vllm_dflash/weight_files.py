# SPDX-License-Identifier: Apache-2.0
"""The safetensors files of a model's directory: which ones are its weights, and what their headers say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

INDEX = "model.safetensors.index.json"


class TensorHeader(NamedTuple):
    """One tensor of a safetensors file.

    dtype: safetensors' name of it, such as "BF16". begin, end: the bytes of the file that hold its values.
    """

    shape: tuple[int, ...]
    dtype: str
    begin: int
    end: int


def weight_files(directory: Path) -> tuple[list[Path], list[str]]:
    """The files that are loaded, and what is wrong with them: those that are there and that the index names.

    Without an index these are all safetensors. With one, vLLM leaves the others alone: a directory may hold the same
    weights twice, in another layout (`consolidated.safetensors`).
    """
    files = sorted(directory.glob("*.safetensors"))
    try:
        named = _indexed(directory / INDEX)
    except ValueError as error:
        return files, [str(error)]
    if named is None:
        return files, []
    missing = sorted(name for name in named if not (directory / name).is_file())
    problems = [f"{directory / INDEX} names files that are not there: {', '.join(missing)}"] if missing else []
    return [file for file in files if file.name in named], problems


def _indexed(index: Path) -> set[str] | None:
    """Names of files; None where there is no index. Raises ValueError naming an index that is none."""
    if not index.is_file():
        return None
    try:
        return {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: {error!r}") from error


def read_header(file: Path) -> dict[str, TensorHeader]:
    """By tensor name. Raises ValueError naming a file that cannot be read or is cut off."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):  # the library checks the header against the file's size
            pass
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(size))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a readable safetensors file (truncated download?): {error}") from error
    header.pop("__metadata__", None)
    return {name: _tensor(entry, data=8 + size) for name, entry in header.items()}


def _tensor(entry: dict[str, Any], data: int) -> TensorHeader:
    """data: the byte of the file at which the tensors' values begin."""
    begin, end = entry["data_offsets"]
    return TensorHeader(tuple(entry["shape"]), entry["dtype"], data + begin, data + end)
