# SPDX-License-Identifier: Apache-2.0
"""The package's logger."""

import logging

#: A child of vLLM's logger, so that its level and format apply.
logger = logging.getLogger("vllm.vllm_dflash")
