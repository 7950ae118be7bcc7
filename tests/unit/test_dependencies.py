# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: plugin -> compat -> proposer -> model_executor -> kernels, config, tree.

hf, training, benchmark, doctor and top stand beside that chain and know neither compat nor proposer; the chain knows
none of them.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_dflash

PACKAGE = Path(vllm_dflash.__file__).resolve().parent

#: The chain, from what everyone may import to what nobody may. A room imports its own level and those before it.
CHAIN = [
    {"config", "tree", "checkpoint", "weight_files", "engine_facts", "kernels"},
    {"model_executor"},
    {"proposer"},
    {"compat"},
    {"plugin"},
]
LEVEL = {room: level for level, rooms in enumerate(CHAIN) for room in rooms}
BESIDE = {"hf", "training", "benchmark", "doctor", "top"}
ENGINE_SIDE = {"compat", "proposer"}

#: vLLM modules that change from release to release: its version and its runners.
VERSIONED_VLLM = ("vllm.version", "vllm.v1.worker", "vllm.v1.spec_decode")
KNOWS_VERSIONS = {"compat", "plugin"}


def imported_modules(source: str, module: str) -> Iterator[str]:
    """Absolute dotted names that a module's source imports, wherever in it the import stands.

    `from a import b` gives `a.b`, as b may be a module. `module` is the dotted name of the importing package or module,
    which relative imports are resolved against.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            parts = [part for part in (base, node.module) if part]
            yield from (".".join([*parts, alias.name]) for alias in node.names)


def room_of(module: str) -> str | None:
    """`vllm_dflash.proposer.step` -> `proposer`; None outside the package and for its root."""
    parts = module.split(".")
    return parts[1] if parts[0] == "vllm_dflash" and len(parts) > 1 else None


def complaint(importer: str, imported: str) -> str | None:
    """Why `importer` must not import `imported`, both dotted; None if it may."""
    room, other = room_of(importer), room_of(imported)
    if any(imported == name or imported.startswith(f"{name}.") for name in VERSIONED_VLLM):
        return None if room in KNOWS_VERSIONS else f"{importer}: only compat/ and plugin.py may import {imported}"
    if room in BESIDE and other in ENGINE_SIDE:
        return f"{importer}: {room} must not know {other}"
    if room in LEVEL and other in BESIDE:
        return f"{importer}: the engine must not need {other}"
    if room in LEVEL and other in LEVEL and LEVEL[other] > LEVEL[room]:
        return f"{importer}: {room} must not import {other}, which builds on it"
    return None


def package_sources() -> Iterator[tuple[str, Path]]:
    """Dotted name and file of every module of the package. A package is named by its `__init__`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(("vllm_dflash", *path.relative_to(PACKAGE).with_suffix("").parts)), path


def test_dependencies_point_one_way() -> None:
    complaints = [
        text
        for module, path in package_sources()
        for imported in imported_modules(path.read_text(encoding="utf-8"), module)
        if (text := complaint(module, imported))
    ]
    assert complaints == []


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("vllm_dflash.config", "import vllm_dflash.proposer.step"),
        ("vllm_dflash.model_executor.draft_model", "from vllm_dflash import proposer"),
        ("vllm_dflash.model_executor.draft_model", "from ..proposer import step"),
        ("vllm_dflash.proposer.dflash", "def f():\n    from vllm_dflash.compat.runner_v1 import adapt"),
        ("vllm_dflash.proposer.dflash", "from vllm_dflash.hf.modeling import DFlashDraftModel"),
        ("vllm_dflash.training.data", "from vllm_dflash.proposer.step import StepInputs"),
        ("vllm_dflash.benchmark.offline", "import vllm_dflash.compat"),
        ("vllm_dflash.doctor.diagnosis", "from vllm_dflash.compat.model_support import engine_facts"),
        ("vllm_dflash.compat.model_support", "from vllm_dflash.doctor.facts import Facts"),
        ("vllm_dflash.benchmark.clients.server", "from vllm_dflash.proposer.step import StepInputs"),
        ("vllm_dflash.top.screen", "from vllm_dflash.compat.metrics.fallbacks import Fallback"),
        ("vllm_dflash.proposer.dflash", "from vllm.v1.worker.gpu_model_runner import GPUModelRunner"),
        ("vllm_dflash.model_executor.draft_model", "from vllm.v1 import spec_decode"),
        ("vllm_dflash.cli", "from vllm.version import __version__"),
    ],
)
def test_a_wrong_import_is_seen(importer: str, source: str) -> None:
    assert [complaint(importer, imported) for imported in imported_modules(source, importer)] != [None]


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("vllm_dflash.plugin", "from vllm_dflash.compat.version import check"),
        ("vllm_dflash.compat.runner_v1", "from vllm.v1.worker.gpu_model_runner import GPUModelRunner"),
        ("vllm_dflash.proposer.dflash", "from . import step"),
        ("vllm_dflash.proposer.__init__", "from .dflash import DFlashProposer"),
        ("vllm_dflash.proposer.dflash", "from vllm.v1.attention.backend import CommonAttentionMetadata"),
        ("vllm_dflash.hf.modeling", "from vllm_dflash.config import DFlashConfig"),
    ],
)
def test_a_right_import_passes(importer: str, source: str) -> None:
    assert [complaint(importer, imported) for imported in imported_modules(source, importer)] == [None]
