# SPDX-License-Identifier: Apache-2.0
"""Interrupted training goes on where it was: one file with the step, the fp32 weights and the optimizer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

STATE_FILE = "training_state.pt"


def save_state(folder: Path, step: int, model: nn.Module, optimizer: Optimizer) -> None:
    """Replace the state in `folder` in one move, so that a kill at any time leaves a whole one."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (STATE_FILE + ".partial")
    torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, partial)
    partial.replace(folder / STATE_FILE)


def load_state(folder: Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Load the state in `folder` into model and optimizer; returns the steps done, 0 where there is no state."""
    file = folder / STATE_FILE
    if not file.is_file():
        return 0
    state = torch.load(file, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def drop_state(folder: Path) -> None:
    """Training is complete: only the model stays."""
    (folder / STATE_FILE).unlink(missing_ok=True)
