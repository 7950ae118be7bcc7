# SPDX-License-Identifier: Apache-2.0
"""On PYTHONPATH, this gives two workers of an engine environments of their own.

In that of rank 0 another version of this package is installed, in that of rank 1 none is.
"""

import importlib.metadata
import multiprocessing
import os
import sys
from importlib.abc import MetaPathFinder

from wrapt import register_post_import_hook

VERSION_OF_RANK_0 = "0.0.7"


def is_rank(rank: int) -> bool:
    """Whether this process is the worker: by name, known soon after the interpreter has started, or by environment."""
    return multiprocessing.current_process().name == f"VllmWorker-{rank}" or os.environ.get("WORKER_SITE") == str(rank)


class NotInstalled(MetaPathFinder):
    """Finds no package, and lets nobody else."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] == "vllm_dflash" and is_rank(1):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


def entry_points(**params):
    found = find_entry_points(**params)
    if params.get("group") != "vllm.general_plugins" or not is_rank(1):
        return found
    return type(found)(each for each in found if not each.value.startswith("vllm_dflash"))


def set_version(package) -> None:
    if is_rank(0):
        package.__version__ = VERSION_OF_RANK_0


sys.meta_path.insert(0, NotInstalled())
find_entry_points, importlib.metadata.entry_points = importlib.metadata.entry_points, entry_points
register_post_import_hook(set_version, "vllm_dflash")
