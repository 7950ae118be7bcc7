# SPDX-License-Identifier: Apache-2.0
"""The child of soak_gpu.py."""

from __future__ import annotations

from multiprocessing.connection import Connection

from gpu.engine_child import start_engine
from gpu.engine_inside import drafter_of, model_runner
from gpu.soak.load import serve_load
from gpu.soak.reference import serve_reference


def serve(connection: Connection) -> None:
    """The engine under test where it drafts, else the reference."""
    llm, job = start_engine(connection)
    if drafter_of(model_runner(llm)) is not None:
        serve_load(connection, llm, job["load"])
    else:
        serve_reference(connection, llm)
