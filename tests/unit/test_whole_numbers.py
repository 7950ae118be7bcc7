# SPDX-License-Identifier: Apache-2.0
"""What counts as a whole number."""

from __future__ import annotations

import pytest

from vllm_dflash.whole_numbers import is_whole


@pytest.mark.parametrize(
    ("value", "limits", "is_one"),
    [
        (1, {}, True),
        (0, {}, False),
        (0, {"least": 0}, True),
        (-1, {"least": 0}, False),
        (7, {"most": 7}, True),
        (8, {"most": 7}, False),
        (10**30, {}, True),
        (True, {}, False),
        (False, {"least": 0}, False),
        (2.0, {}, False),
        ("2", {}, False),
        (None, {}, False),
    ],
)
def test_whole_numbers(value: object, limits: dict[str, int], is_one: bool) -> None:
    assert is_whole(value, **limits) is is_one
