# SPDX-License-Identifier: Apache-2.0
"""The installed package: light imports, entry points that exist, one version."""

import importlib.util
import subprocess
import sys
from importlib.metadata import distribution, entry_points
from pathlib import Path

import pytest

import vllm_dflash

ROOT = Path(vllm_dflash.__file__).resolve().parents[1]
HEAVY = {"torch", "vllm", "transformers", "ray"}


def heavy_modules_after(statement: str) -> set[str]:
    """Which heavy modules a fresh interpreter has loaded after running a statement."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return HEAVY & set(run.stdout.split())


@pytest.mark.parametrize(
    "module", ["vllm_dflash", "vllm_dflash.plugin", "vllm_dflash.cli", "vllm_dflash.demo", "vllm_dflash.generate"]
)
def test_import_is_light(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} does not exist yet")
    assert heavy_modules_after(f"import {module}") == set()


def test_the_probe_sees_a_heavy_import() -> None:
    assert "transformers" in heavy_modules_after("import transformers")


def test_vllm_finds_the_plugin() -> None:
    found = {point.name: point.value for point in entry_points(group="vllm.general_plugins")}
    assert found["dflash"] == "vllm_dflash.plugin:register"


def test_command_is_installed() -> None:
    (command,) = entry_points(group="console_scripts", name="vllm-dflash")
    assert callable(command.load())


def test_installed_version_is_the_package_version() -> None:
    assert distribution("vllm-dflash").version == vllm_dflash.__version__


def test_version_has_one_source() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["dynamic"] == ["version"]
    assert "version" not in project


def test_public_names_exist() -> None:
    assert all(hasattr(vllm_dflash, name) for name in vllm_dflash.__all__)


def test_ships_type_information() -> None:
    assert (Path(vllm_dflash.__file__).parent / "py.typed").is_file()
