# SPDX-License-Identifier: Apache-2.0
"""Clock and power of the card while engines run: what tells a slow engine from a slow card."""

from __future__ import annotations

import os
import statistics
import subprocess
import threading
import time
from collections.abc import Iterable
from typing import Self

from gpu.names import Record
from gpu.output import say

SAMPLE_MS = 100
QUERY = ["--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-lms", str(SAMPLE_MS)]

Sample = tuple[float, float, float]  # time.monotonic(), SM clock in MHz, power in W


class CardMonitor:
    """Samples the card ten times a second, from `nvidia-smi`; without that program there are no samples."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        try:
            command = ["nvidia-smi", "-i", first_card(os.environ.get("CUDA_VISIBLE_DEVICES")), *QUERY]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except FileNotFoundError:
            say("no nvidia-smi here: clock and power of the card are not recorded")
            return self
        threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            if (sample := parsed(line)) is not None:
                self.samples.append((time.monotonic(), *sample))

    def between(self, begin: float, end: float) -> Record:
        """Medians of the samples of that time; empty if there were none."""
        found = [sample for sample in list(self.samples) if begin <= sample[0] <= end]
        if not found:
            return {}
        return {
            "sm_mhz": statistics.median(sample[1] for sample in found),
            "watts": statistics.median(sample[2] for sample in found),
        }


def first_card(visible: str | None) -> str:
    """The card that a process computes on: the first that CUDA_VISIBLE_DEVICES names."""
    return (visible or "0").split(",")[0]


def parsed(line: str) -> tuple[float, float] | None:
    """(MHz, W) of one line of nvidia-smi; None where the card does not tell."""
    fields = line.split(",")
    try:
        clock, watts = map(float, fields)
    except ValueError:
        return None
    return clock, watts
