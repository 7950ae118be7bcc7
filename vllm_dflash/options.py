# SPDX-License-Identifier: Apache-2.0
"""The plugin's own options: `--additional-config '{"dflash": {...}}'`. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vllm_dflash.whole_numbers import is_whole

#: A wider tree costs more than a step of a large model does.
MAX_NODES = 127
#: Of trees whose size follows the load: beyond, a GPU's forward of one request is no longer almost free.
AUTO = "auto"
MAX_AUTO_NODES = 63

_FLAG = '--additional-config\'s "dflash"'


@dataclass(frozen=True)
class DFlashOptions:
    """What a user may choose. Whatever it is, the output stays the target's."""

    #: "fp8": the drafter's weights become FP8 when it is loaded (model_executor/fp8_weights.py).
    draft_weights: str | None = None
    #: How many tokens may be drafted: the draft LM head reads only their rows.
    draft_vocab_size: int | None = None
    #: Which: token ids by frequency, or a corpus to count them in (draft_vocabulary.py). Default: the lowest ids.
    draft_vocab_file: str | None = None
    #: Verify a tree of so many candidates instead of a chain; "auto": of as many as pay (docs/trees.md).
    tree: int | str | None = None
    #: Admit prompts every so many steps; "auto": at the interval that pays, the default with "tree": "auto", else 1.
    prefill_schedule_interval: int | str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError naming the key and the value."""
        if self.draft_weights not in (None, "fp8"):
            raise ValueError(f'{_FLAG}: "draft_weights" must be "fp8" or absent, found {self.draft_weights!r}')
        if self.tree not in (None, AUTO) and not is_whole(self.tree, most=MAX_NODES):
            raise ValueError(
                f'{_FLAG}: "tree" must be "auto" or a number of nodes from 1 to {MAX_NODES}, found {self.tree!r}'
            )
        if self.prefill_schedule_interval not in (None, AUTO) and not is_whole(self.prefill_schedule_interval):
            raise ValueError(
                f'{_FLAG}: "prefill_schedule_interval" must be "auto" or a positive integer, '
                f"found {self.prefill_schedule_interval!r}"
            )
        size = self.draft_vocab_size
        if size is not None and not is_whole(size):
            raise ValueError(f'{_FLAG}: "draft_vocab_size" must be a positive integer, found {size!r}')
        if self.draft_vocab_file is None:
            return
        if size is None:
            raise ValueError(f'{_FLAG}: "draft_vocab_file" needs a "draft_vocab_size" beside it')
        if not isinstance(self.draft_vocab_file, str) or not Path(self.draft_vocab_file).is_file():
            raise ValueError(f'{_FLAG}: "draft_vocab_file" = {self.draft_vocab_file!r} is not a file')

    @property
    def num_tree_nodes(self) -> int | None:
        """Of the largest tree that is verified; None: chains."""
        return MAX_AUTO_NODES if isinstance(self.tree, str) else self.tree

    @classmethod
    def from_additional_config(cls, additional_config: Mapping[str, Any] | None) -> DFlashOptions:
        """Parse the `dflash` key of vLLM's additional config. Raises ValueError naming an unknown key."""
        options = (additional_config or {}).get("dflash") or {}
        if not isinstance(options, Mapping):
            raise ValueError(f"{_FLAG} must be an object, found {options!r}")
        known = _known_keys()
        unknown = sorted(set(options) - known)
        if unknown:
            raise ValueError(f"{_FLAG} has unknown key(s) {unknown}; known keys: {sorted(known)}")
        return cls(**options)


def misplaced_options(additional_config: object, is_ours: bool) -> Iterator[str]:
    """What of an engine's additional config looks meant for this plugin, and has no effect. Other keys are others'."""
    if not isinstance(additional_config, Mapping):
        return
    if not is_ours:
        if "dflash" in additional_config:
            yield f"{_FLAG} has no effect: --speculative-config names no drafter that this plugin drafts with"
        return
    known = _known_keys()
    for key, value in additional_config.items():
        has_options = isinstance(value, Mapping) and len(value) > 0 and known.issuperset(value)
        if key != "dflash" and (has_options or key in known):
            meant = '"dflash"' if has_options else f'in "dflash": {{{key!r}: ...}}'
            yield f"--additional-config has {key!r}, which has no effect there: is it meant to be {meant}?"


def _known_keys() -> set[str]:
    return {field.name for field in fields(DFlashOptions)}
