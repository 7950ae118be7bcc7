# SPDX-License-Identifier: Apache-2.0
"""Whether every process of an engine has this plugin: what is found out, what is said, and when."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("cloudpickle")
pytest.importorskip("wrapt")
import cloudpickle

from tests.helpers import drafter_config
from vllm_dflash import __version__
from vllm_dflash.compat import ownership, patching
from vllm_dflash.compat.version import installed_version
from vllm_dflash.compat.workers import executor
from vllm_dflash.compat.workers.extension import CheckedWorker, arrange_check
from vllm_dflash.compat.workers.facts import ProcessFacts, check_all, fault, make_probe
from vllm_dflash.config import DFlashConfig

HOST = socket.gethostname()
GOOD = ProcessFacts("node-b", 3, "0.1.0", "", True, "0.32.1", None, None)

#: Runs a probe where no module of this package can be imported.
ELSEWHERE = """
import json, sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vllm_dflash":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NotInstalled())
import cloudpickle
worker = type("Worker", (), {"rank": 5})()
print(json.dumps(cloudpickle.loads(sys.stdin.buffer.read())(worker)))
"""


def test_the_probe_runs_where_the_package_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DFLASH", "0")
    monkeypatch.setenv("VLLM_PLUGINS", "lora,dflash")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], input=cloudpickle.dumps(make_probe()), capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
    missing = "ModuleNotFoundError: No module named 'vllm_dflash'"
    assert ProcessFacts(**json.loads(done.stdout)) == (
        HOST, 5, None, missing, False, installed_version(), "0", "lora,dflash"
    )  # fmt: skip


def test_the_probe_here(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_DFLASH", raising=False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    facts = ProcessFacts(**make_probe()(None))
    assert facts == (HOST, None, __version__, "", True, installed_version(), None, None)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in which vLLM has loaded the plugin."""
    from vllm_dflash.compat import install

    monkeypatch.setattr(install, "_installed", True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"switch": "1", "choice": "lora,dflash"}, None),
        (
            {"package": None, "problem": "ImportError: wrapt"},
            "vllm_dflash cannot be imported (ImportError: wrapt); install it in that environment with pip (pip install "
            "vllm-dflash==0.1.0)",
        ),
        (
            {"package": "0.0.7", "is_registered": False},
            "vllm-dflash is 0.0.7 there, the engine's configuration is by 0.1.0; install the same",
        ),
        (
            {"is_registered": False, "switch": "0"},
            "switched off there by VLLM_DFLASH=0; unset it, or set it for the whole engine",
        ),
        (
            {"is_registered": False, "vllm": "0.31.1"},
            "vLLM is 0.31.1 there, and vllm-dflash 0.1.0 is for 0.32.x; install one of these",
        ),
        (
            {"is_registered": False, "choice": "lora"},
            "left out there by VLLM_PLUGINS='lora'; add \"dflash\" to it, or set it for the whole engine",
        ),
        (
            {"is_registered": False},
            "vLLM has not loaded its entry point there (vllm.general_plugins: dflash); install it in that environment "
            "with pip (pip install vllm-dflash==0.1.0), not by copying its folder. If it is installed, that process's "
            "log says why it did not load",
        ),
    ],
)
def test_what_is_wrong_and_what_to_do(changes: dict[str, Any], expected: str | None) -> None:
    assert fault(GOOD._replace(**changes), "0.1.0") == expected


def test_the_error_names_the_processes_at_fault_alone() -> None:
    check_all([GOOD, GOOD], "0.1.0")
    with pytest.raises(RuntimeError) as caught:
        check_all([GOOD._replace(host="node-a", rank=None, package="0.2.0"), GOOD, GOOD._replace(rank=4)], "0.1.0")
    lines = str(caught.value).splitlines()
    assert lines[1:-1] == [
        "  engine core on host node-a: vllm-dflash is 0.2.0 there, the engine's configuration is by 0.1.0; install the "
        "same"
    ]
    assert lines[-1].endswith("(docs/scaling.md).")


# The engine core's check.


def engine(claimed: bool = True, node_rank: int = 0) -> Any:
    draft = SimpleNamespace(hf_config=SimpleNamespace())
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(method="dflash", draft_model_config=draft, draft_tensor_parallel_size=1),
        parallel_config=SimpleNamespace(node_rank_within_dp=node_rank),
    )
    if claimed:
        ownership.claim(config.speculative_config, DFlashConfig.from_dict(drafter_config(), source="drafter"))
    return config


@pytest.fixture
def executor_class(monkeypatch: pytest.MonkeyPatch, registered: None) -> Any:
    """vLLM's class, as far as it is patched: its workers answer as `answers` says, unless its start fails."""
    monkeypatch.setattr(patching, "_originals", {})

    class Executor:
        answers: list[dict[str, Any]] = []
        error: Exception | None = None

        def __init__(self, vllm_config: Any) -> None:
            self.vllm_config, self.asked, self.is_shut_down = vllm_config, 0, False
            made.append(self)
            if self.error:
                raise self.error

        def collective_rpc(self, method: Any) -> list[dict[str, Any]]:
            self.asked += 1
            return self.answers

        def shutdown(self) -> None:
            self.is_shut_down = True

    made: list[Executor] = []
    Executor.made = made  # type: ignore[attr-defined]
    executor.install(SimpleNamespace(Executor=Executor))  # type: ignore[arg-type]
    return Executor


def test_workers_of_our_engines_are_asked(executor_class: Any) -> None:
    executor_class.answers = [GOOD._replace(package=__version__)._asdict()]
    made = executor_class(engine())
    assert (made.asked, made.is_shut_down) == (1, False)


@pytest.mark.parametrize("config", [engine(claimed=False), engine(node_rank=1)], ids=["not ours", "not the first node"])
def test_no_other_workers_are_asked(executor_class: Any, config: Any) -> None:
    executor_class.answers = [GOOD._replace(package=None)._asdict()]
    assert executor_class(config).asked == 0


def test_a_worker_at_fault_ends_the_engine(executor_class: Any) -> None:
    executor_class.answers = [GOOD._replace(package=__version__, is_registered=False, switch="0")._asdict()]
    with pytest.raises(RuntimeError, match=r"rank 3 on host node-b: switched off there by VLLM_DFLASH=0"):
        executor_class(engine())
    assert executor_class.made[0].is_shut_down


def test_a_core_at_fault_ends_the_engine(executor_class: Any) -> None:
    config = engine()
    config.speculative_config.draft_model_config.hf_config.drafted_by_vllm_dflash = "9.9"
    executor_class.answers = [GOOD._replace(package="9.9")._asdict()]
    with pytest.raises(RuntimeError, match=f"engine core on host {HOST}: vllm-dflash is {__version__} there"):
        executor_class(config)


def test_a_worker_without_the_package_is_told_from_other_failures(executor_class: Any) -> None:
    from_ray = (
        "ray::RayWorkerProc.initialize_worker() (pid=7, ip=10.0.0.8, actor_id=ab)\nModuleNotFoundError: No module"
    )
    cause = ValueError(f"{from_ray} named 'vllm_dflash'")
    executor_class.error = RuntimeError("a worker failed")
    executor_class.error.__cause__ = cause
    with pytest.raises(RuntimeError, match=r"a worker on 10.0.0.8 has no module vllm_dflash \(not") as caught:
        executor_class(engine())
    assert caught.value.__cause__ is executor_class.error
    executor_class.error = RuntimeError("No module named 'flash_attn'")
    with pytest.raises(RuntimeError, match="^No module named 'flash_attn'$"):
        executor_class(engine())


# A worker's own check.


def make_worker(vllm_config: Any) -> Any:
    """As vLLM does: the class joins the bases of the worker's, which is then called."""

    class WorkerBase:
        def __init__(self, vllm_config: Any, local_rank: int, rank: int) -> None:
            self.rank = rank

    class Worker(WorkerBase):
        pass

    Worker.__bases__ += (CheckedWorker,)
    return Worker(vllm_config=vllm_config, local_rank=0, rank=6)


def test_a_worker_checks_itself(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_dflash.compat import install

    assert make_worker(engine()).rank == 6
    monkeypatch.setattr(install, "_installed", False)
    monkeypatch.setenv("VLLM_DFLASH", "0")
    assert make_worker(engine(claimed=False)).rank == 6
    with pytest.raises(RuntimeError, match=f"rank 6 on host {HOST}: switched off there by VLLM_DFLASH=0"):
        make_worker(engine())


@pytest.mark.parametrize(
    ("use_ray", "data_parallel_backend", "of_user", "expected"),
    [
        (True, "mp", "", "vllm_dflash.compat.workers.extension.CheckedWorker"),
        (False, "ray", "", "vllm_dflash.compat.workers.extension.CheckedWorker"),
        (False, "mp", "", ""),
        (True, "ray", "theirs.Extension", "theirs.Extension"),
    ],
)
def test_workers_that_ray_places_check_themselves(
    use_ray: bool, data_parallel_backend: str, of_user: str, expected: str
) -> None:
    parallel: Any = SimpleNamespace(
        use_ray=use_ray, data_parallel_backend=data_parallel_backend, worker_extension_cls=of_user
    )
    arrange_check(parallel)
    assert parallel.worker_extension_cls == expected


def test_a_configuration_of_ours_can_be_read_without_the_package() -> None:
    """What travels with vLLM's configuration is of Python's own types: a worker can then say what it lacks."""
    config = engine()
    drafter = DFlashConfig.from_dict(drafter_config(), source="drafter")
    from vllm_dflash.compat.metrics.fallbacks import Fallback

    ownership.claim(config.speculative_config, drafter, [1, 2], 4, True, [Fallback.HYBRID_TARGET])
    hf_config = vars(config.speculative_config.draft_model_config.hf_config)
    assert b"vllm_dflash.compat" not in cloudpickle.dumps(hf_config)
    assert ownership.startup_fallbacks(config) == (Fallback.HYBRID_TARGET,)
