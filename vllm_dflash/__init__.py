# SPDX-License-Identifier: Apache-2.0
"""DFlash speculative decoding for stock vLLM. Importing this package imports neither torch nor vllm."""

from vllm_dflash.config import DFlashConfig

__all__ = ["DFlashConfig", "__version__"]
__version__ = "0.1.0"
