# SPDX-License-Identifier: Apache-2.0
"""Models that are named by a hub id: configs and tokenizers are fetched, of the weights only their headers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_dflash.console import looks_like_hub_id
from vllm_dflash.doctor.facts import TensorFacts, Weights
from vllm_dflash.doctor.reading import UnreadableError

#: What the checks read, and no weights.
_SMALL_FILES = ["*.json", "*.jinja"]
#: No request of the hub's library waits longer.
_TIMEOUT_S = 10


def locate(flag: str, model: str) -> tuple[Path, Weights | None]:
    """The directory of a model's small files, and its weights' headers where they are not in it too.

    Raises UnreadableError where the model is neither a directory nor a hub id that can be reached.
    """
    if Path(model).is_dir():
        return Path(model), None
    if not looks_like_hub_id(model):
        raise UnreadableError(f"{flag}: there is no directory {model}, and it is no hub id (owner/name)")
    directory = _fetch(flag, model)
    if any(directory.glob("*.safetensors")):
        return directory, None
    return directory, _remote_headers(model)


def _fetch(flag: str, model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        # Falls back on what was downloaded before where the hub cannot be reached.
        return Path(snapshot_download(model, allow_patterns=_SMALL_FILES, etag_timeout=_TIMEOUT_S))
    except RepositoryNotFoundError as error:
        raise UnreadableError(
            f"{flag}: there is no directory {model}, and the hub has no such model, or not for you: {error}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UnreadableError(
            f"{flag}: there is no directory {model}, the hub cannot be reached, and no earlier download is here"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise UnreadableError(f"{flag}: there is no directory {model}, and the hub refuses it: {error}") from error


def _remote_headers(model: str) -> Weights:
    """Names, shapes and types of a hub model's tensors. Their values are not looked at."""
    from huggingface_hub import get_safetensors_metadata

    try:
        metadata = get_safetensors_metadata(model)
    except Exception as error:  # the library's HTTP client is its own matter, and has errors of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Weights(problems=(f"{model}: the headers of its weights cannot be read: {reason}",), has_headers=False)
    tensors = {
        name: _tensor(entry) for file in metadata.files_metadata.values() for name, entry in file.tensors.items()
    }
    return Weights(tensors)


def _tensor(entry: Any) -> TensorFacts:
    begin, end = entry.data_offsets
    return TensorFacts(tuple(entry.shape), entry.dtype, end - begin)
