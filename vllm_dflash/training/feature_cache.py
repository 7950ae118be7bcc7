# SPDX-License-Identifier: Apache-2.0
"""The target's features on disk: computed once, read at every epoch.

A cache folder holds `shard-00000.safetensors` and so on, each with one tensor `features` [rows, F*H] in which sequences
lie one after another without padding, and `index.json`: what the cache was made of, and where each sequence lies.
Every shard says in its own header what it was made of and gets its name only when it is complete, and the index is
written last (by `feature_writing`). So a kill at any time leaves nothing that passes for complete, and a rerun keeps
the shards that are. One process writes a folder at a time.

Letters: B sequences, S tokens of a sequence (padded ones in a batch), F tapped layers, H hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_dflash.training.feature_plan import DTYPE_NAMES, refuse_mismatch

INDEX_FILE = "index.json"
TENSOR = "features"


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
            shard_slice(shard_file(folder, number), [rows, self.num_features], self.dtype)
            for number, rows in enumerate(index["shard_rows"])
        ]

    @classmethod
    def open(cls, folder: Path, fingerprint: dict[str, Any]) -> FeatureCache:
        """Open the cache in `folder`, which has to be complete and of this `cache_fingerprint`.

        Raises ValueError naming what differs, or the file that is missing, truncated or of another shape.
        """
        index = read_index(folder)
        refuse_mismatch(folder, index["fingerprint"], fingerprint)
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
        """Features of several sequences, cut at `padded_length` or padded with zeros: [B, padded_length, F*H].

        In pinned memory where there is a GPU to send them to.
        """
        shape, pins = (len(indices), padded_length, self.num_features), torch.cuda.is_available()
        padded = torch.empty(shape, dtype=self.dtype, pin_memory=pins)
        for row, index in enumerate(indices):
            length = min(self.length(index), padded_length)
            padded[row, :length] = self._mapped(index, length)
            padded[row, length:] = 0
        return padded

    def _mapped(self, index: int, length: int) -> Tensor:
        """The first `length` rows of a sequence, [length, F*H], as they lie in the file."""
        shard, start, _ = self._places[index]
        return self._shards[shard][start : start + length]


def read_index(folder: Path) -> dict[str, Any]:
    """What `index.json` says. Raises ValueError naming the folder or the file when it is missing or damaged."""
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


def shard_file(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"shard-{number:05d}.safetensors"


def shard_slice(file: Path, shape: list[int], dtype: torch.dtype) -> Any:
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
