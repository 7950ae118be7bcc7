# SPDX-License-Identifier: Apache-2.0
"""Replacing an attribute of vLLM once, and undoing it in tests."""

from __future__ import annotations

from typing import Any

_originals: dict[tuple[int, str], tuple[Any, Any]] = {}


def replace(owner: Any, name: str, value: Any) -> None:
    """Set `owner.name` to `value`. Replacing the same attribute again is refused unless it is the same value."""
    key = (id(owner), name)
    if key in _originals:
        if getattr(owner, name) is value:
            return
        raise RuntimeError(f"{owner!r}.{name} is already replaced")
    _originals[key] = (owner, getattr(owner, name))
    setattr(owner, name, value)


def is_replaced(owner: Any, name: str) -> bool:
    """Whether `replace` has set this attribute."""
    return (id(owner), name) in _originals


def original(owner: Any, name: str) -> Any:
    """What `owner.name` was before it was replaced."""
    return _originals[(id(owner), name)][1]


def restore_all() -> None:
    """Put every original back."""
    while _originals:
        (_, name), (owner, value) = _originals.popitem()
        setattr(owner, name, value)
