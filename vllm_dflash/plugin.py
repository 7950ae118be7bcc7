# SPDX-License-Identifier: Apache-2.0
"""The entry point that vLLM calls in every one of its processes."""

from __future__ import annotations

from vllm_dflash.logs import logger


def register() -> None:
    """Take over method "dflash" in this process, or say in one line why not. Cheap, and safe to repeat."""
    from vllm_dflash.compat import version

    if version.is_switched_off():
        logger.info("vllm_dflash: standing aside, %s=0", version.SWITCH)
        return
    installed = version.installed_version()
    if not version.is_supported(installed):
        logger.warning(
            "vllm_dflash: standing aside, vLLM %s is installed and %s.x is supported", installed, version.SUPPORTED
        )
        return
    from vllm_dflash.compat.install import install

    install()
