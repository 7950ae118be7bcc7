# SPDX-License-Identifier: Apache-2.0
"""On PYTHONPATH, this prepares Triton's interpreter in every Python process of an engine, its workers included.

Kernels that leave their launch's tensors are errors there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests import triton_cpu  # noqa: E402

triton_cpu.install()

from tests import memcheck  # noqa: E402

memcheck.install()
