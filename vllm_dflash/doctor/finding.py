# SPDX-License-Identifier: Apache-2.0
"""What a check found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Severity(IntEnum):
    """How bad it is. A larger one is worse."""

    OK = 0
    INFO = 1  # worth knowing, nothing to put right
    WARNING = 2  # the pair starts, and is likely slower than it could be
    ERROR = 3  # the pair does not start, or the drafts are worth nothing


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    id: stable, for scripts; several findings may share one.
    seen: what the files say. change: what to do about it; empty where there is nothing to do.
    """

    severity: Severity
    id: str
    seen: str
    change: str = ""


def ok(id: str, seen: str) -> Finding:
    return Finding(Severity.OK, id, seen)


def info(id: str, seen: str, change: str = "") -> Finding:
    return Finding(Severity.INFO, id, seen, change)


def warning(id: str, seen: str, change: str) -> Finding:
    return Finding(Severity.WARNING, id, seen, change)


def error(id: str, seen: str, change: str) -> Finding:
    return Finding(Severity.ERROR, id, seen, change)


def worst(findings: Sequence[Finding]) -> Severity:
    """Of several findings; OK where there are none."""
    return max((finding.severity for finding in findings), default=Severity.OK)


def exit_code(findings: Sequence[Finding]) -> int:
    """0: nothing to put right; 1: warnings; 2: errors."""
    return {Severity.WARNING: 1, Severity.ERROR: 2}.get(worst(findings), 0)
