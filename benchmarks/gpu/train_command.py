# SPDX-License-Identifier: Apache-2.0
"""A drafter trained as a user trains one: by the command, with a recipe file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml


def train_drafter(target: Path, prompts: Path, output: Path, recipe: dict[str, dict[str, Any]]) -> None:
    """Write recipe.yaml beside the `output` folder and run `vllm-dflash train`. Raises CalledProcessError."""
    file = output.with_name("recipe.yaml")
    file.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "vllm_dflash", "train", "--target", str(target)]
    command += ["--prompts", str(prompts), "--output", str(output), "--config", str(file)]
    subprocess.run(command, check=True)
