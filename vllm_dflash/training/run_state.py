# SPDX-License-Identifier: Apache-2.0
"""Where a training is: written whole or not at all, so that a kill at any time leaves a state to go on from."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator

from vllm_dflash.files import write_whole
from vllm_dflash.training.evaluate import Acceptance

_PREFIX, _FILE = "checkpoint-", "run_state.json"


@dataclass
class RunState:
    """Steps done, and the best drafter so far."""

    step: int = 0
    best_step: int = 0
    best_drafts: int = 0
    best_accepted: tuple[int, ...] = ()  # by position

    @property
    def best(self) -> Acceptance:
        """Of the best drafter. Raises ValueError before there is one."""
        if not self.best_drafts:
            raise ValueError("no drafter has been measured yet")
        return Acceptance(self.best_drafts, tuple(self.best_accepted))

    def note(self, found: Acceptance) -> bool:
        """Whether this drafter is the best so far."""
        if self.best_drafts and found.length <= self.best.length:
            return False
        self.best_step, self.best_drafts, self.best_accepted = self.step, found.drafts, found.accepted
        return True

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """Of a checkpoint's folder, or of a finished run's."""
        return cls(**json.loads((folder / _FILE).read_text(encoding="utf-8")))

    def write(self, folder: Path) -> None:
        """There."""
        write_whole(folder / _FILE, json.dumps(asdict(self)) + "\n")


def finished(work: Path) -> RunState | None:
    """The state of a run that has come to its end."""
    return RunState.read(work) if (work / _FILE).is_file() else None


def latest_checkpoint(work: Path) -> Path | None:
    """The folder of the last whole checkpoint, if there is one."""
    found = [folder for folder in work.glob(_PREFIX + "*") if folder.name[len(_PREFIX) :].isdigit()]
    return max(found, key=lambda folder: int(folder.name[len(_PREFIX) :]), default=None)


def save_checkpoint(accelerator: Accelerator, work: Path, state: RunState) -> None:
    """Weights, optimizer, random states of all ranks, and `state`. Earlier checkpoints go when this one is whole."""
    final = work / f"{_PREFIX}{state.step}"
    partial = work / f"partial-{state.step}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        state.write(partial)
        partial.rename(final)
        drop_checkpoints(work, but=final)


def drop_checkpoints(work: Path, but: Path | None = None) -> None:
    """Remove checkpoints, whole ones and begun ones."""
    for folder in (*work.glob(_PREFIX + "*"), *work.glob("partial-*")):
        if folder != but:
            shutil.rmtree(folder)
