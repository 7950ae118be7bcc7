# SPDX-License-Identifier: Apache-2.0
"""On PYTHONPATH, this prepares Triton's interpreter in every Python process of an engine, its workers included."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.triton_cpu import install  # noqa: E402

install()
