# SPDX-License-Identifier: Apache-2.0
"""What vLLM can do with a target's architecture, told from its installed sources.

vLLM's registry answers the same, but importing it takes longer than all other checks of a pair together. Reading the
sources takes a tenth of a second. Whatever they do not plainly say is None, "unknown".
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from vllm_dflash.compat.version import SUPPORTED, installed_version, is_supported, is_switched_off
from vllm_dflash.engine_facts import EngineFacts

#: The tables of vLLM's registry that name targets: architecture -> (module, class).
_TABLES = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")
_MODELS = "vllm.model_executor.models"
#: The interface of models that hand out hidden states of their layers.
_INTERFACE = "SupportsEagle3"

#: Backends with non-causal attention, and what their caches may hold. vLLM's classes say both, but are slow to import.
_QUANTIZED = ("fp8", "fp8_e4m3")
KV_CACHE_DTYPES: dict[str, frozenset[str]] = {
    "CPU_ATTN": frozenset({"auto", *_QUANTIZED, "fp8_e5m2"}),
    "FLASH_ATTN": frozenset({"auto", "float16", "bfloat16", *_QUANTIZED}),
    "FLASHINFER": frozenset({"auto", "float16", "bfloat16", *_QUANTIZED, "fp8_e5m2", "nvfp4", "nvfp4_4over6"}),
    "FLEX_ATTENTION": frozenset({"auto", "float16", "bfloat16"}),
    "TRITON_ATTN": frozenset(
        {"auto", "float16", "bfloat16", *_QUANTIZED, "fp8_e5m2"}
        | {"int4_per_token_head", "int8_per_token_head", "fp8_per_token_head"}
    ),
}


def engine_facts(architectures: Sequence[str]) -> EngineFacts:
    """The installed vLLM, and what it can do with a target of one of these architectures."""
    version = installed_version()
    knows, taps = _target_support(architectures) if is_supported(version) else (None, None)
    return EngineFacts(
        version=version,
        supported=f"{SUPPORTED}.x",
        is_supported=is_supported(version),
        is_switched_off=is_switched_off(),
        knows_target=knows,
        taps_target=taps,
        kv_cache_dtypes=KV_CACHE_DTYPES,
    )


def _target_support(architectures: Sequence[str]) -> tuple[bool | None, bool | None]:
    """Whether vLLM lists one of the architectures, and whether that one's class has the interface."""
    table = _registry()
    if not table or not architectures:
        return None, None
    known = [table[name] for name in architectures if name in table]
    if not known:
        return False, None
    module, name = known[0]
    return True, _has_interface(module if "." in module else f"{_MODELS}.{module}", name)


@cache
def _registry() -> dict[str, tuple[str, str]]:
    """architecture -> (module, class); empty where the registry's source does not look as expected."""
    source = _source(f"{_MODELS}.registry")
    found: dict[str, tuple[str, str]] = {}
    for node in [] if source is None else _parsed(source).body:
        names = {t.id for t in node.targets if isinstance(t, ast.Name)} if isinstance(node, ast.Assign) else set()
        if isinstance(node, ast.Assign) and names & set(_TABLES):
            found |= ast.literal_eval(node.value)
    return found


def _has_interface(module: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> bool | None:
    """Whether class `name` of a module of vLLM's inherits from the interface; None: could not be followed."""
    if name == _INTERFACE:
        return True
    if module.split(".")[0] != "vllm":
        return False
    source = _source(module)
    if source is None or (module, name) in seen:
        return None
    tree, seen = _parsed(source), seen | {(module, name)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _any([_has_interface(module, base, seen) for base in _base_names(node)])
    answers = [_has_interface(*origin, seen) for origin in _origins(tree, module, source, name)]
    if not answers:
        return None
    # A platform's own variants stand side by side: only where they agree is there an answer.
    return answers[0] if len(set(answers)) == 1 else None


def _any(answers: list[bool | None]) -> bool | None:
    """A class has the interface if a base has; one that could not be followed leaves it open."""
    return True if True in answers else None if None in answers else False


def _base_names(node: ast.ClassDef) -> Iterator[str]:
    """Plain names of the bases: `Base` and `Base[T]`. Dotted ones (`nn.Module`) are not vLLM's."""
    for base in node.bases:
        inner = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(inner, ast.Name):
            yield inner.id


def _origins(tree: ast.Module, module: str, source: Path, name: str) -> Iterator[tuple[str, str]]:
    """Where `from ... import name` takes the name from: (module, its name there)."""
    package = module if source.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        for alias in node.names:
            if (alias.asname or alias.name) == name:
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
                yield ".".join(part for part in (base, node.module) if part), alias.name


@cache
def _parsed(source: Path) -> ast.Module:
    return ast.parse(source.read_text(encoding="utf-8"))


def _source(module: str) -> Path | None:
    """The file of a module of vLLM's, found without importing anything."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        for file in (Path(location, *rest[:-1], f"{rest[-1]}.py"), Path(location, *rest, "__init__.py")):
            if file.is_file():
                return file
    return None
