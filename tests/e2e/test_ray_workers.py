# SPDX-License-Identifier: Apache-2.0
"""Workers in Ray actors of several environments, as vLLM's two Ray executors start them: what reaches the driver.

vLLM refuses to run its Ray executors on a CPU, for want of a kind of device to place workers by. Everything up to the
model's loading works, and that is as far as a worker without this plugin may come.
"""

from __future__ import annotations

import os
import socket

import pytest

pytest.importorskip("ray")
import cloudpickle
import ray
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.ray_executor_v2 import RayWorkerProc
from vllm.v1.executor.ray_utils import RayWorkerWrapper

from tests.e2e.engines import ROOT, TARGET, dflash
from vllm_dflash import __version__
from vllm_dflash.compat.workers.facts import make_probe

pytestmark = pytest.mark.engine

SITE = os.pathsep.join((str(ROOT / "tests" / "worker_site"), str(ROOT)))
#: Environments of nodes.
ENVIRONMENTS = {
    "complete": {"PYTHONPATH": str(ROOT)},
    "not installed": {"PYTHONPATH": SITE, "WORKER_SITE": "1"},
    "switched off": {"PYTHONPATH": str(ROOT), "VLLM_DFLASH": "0"},
}
WAIT_S = 240
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # or it writes a token into the home directory
        patch.setenv("RAY_raylet_start_wait_time_s", "180")  # 30 are too few on a busy machine
        yield ray.init(
            address="local", num_cpus=1, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False
        )
        ray.shutdown()


def engine_config(**arguments):
    args = EngineArgs(
        model=str(TARGET),
        dtype="float32",
        max_model_len=256,
        kv_cache_memory_bytes=64 << 20,
        distributed_executor_backend="ray",
        **dflash(),
        **arguments,
    )
    return args.create_engine_config()


@pytest.fixture(scope="module")
def config():
    return engine_config()


@pytest.fixture(scope="module")
def workers(cluster):
    """Workers of vLLM's first Ray executor, one in each environment, that start up side by side."""
    actor = ray.remote(num_cpus=0)(RayWorkerWrapper)
    return {
        name: actor.options(runtime_env={"env_vars": variables}).remote(rpc_rank=0)
        for name, variables in ENVIRONMENTS.items()
    }


def initialise(worker, config):
    """As `RayDistributedExecutor` does before it has the device initialised and the model loaded."""
    arguments = {
        "vllm_config": config,
        "rank": 0,
        "local_rank": 0,
        "distributed_init_method": "",
        "is_driver_worker": True,
    }
    ray.get(worker.execute_method.remote("init_worker", [arguments]), timeout=WAIT_S)


def test_complete(workers, config):
    initialise(workers["complete"], config)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ("switched off", f"rank 0 on host {HOST}: switched off there by VLLM_DFLASH=0; unset it"),
        ("not installed", "ModuleNotFoundError: No module named 'vllm_dflash'"),
    ],
)
def test_incomplete(environment, expected, workers, config):
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        initialise(workers[environment], config)
    assert expected in str(caught.value)


def test_beside_an_extension_of_the_user(workers):
    """Its place is taken, so the worker starts; then the engine core asks what it has."""
    config = engine_config(worker_extension_cls="contextlib.AbstractContextManager")
    worker = workers["not installed"]
    initialise(worker, config)
    facts = ray.get(worker.execute_method.remote(cloudpickle.dumps(make_probe())), timeout=WAIT_S)
    assert (facts["host"], facts["rank"], facts["package"]) == (HOST, 0, None)
    assert facts["problem"] == "ModuleNotFoundError: No module named 'vllm_dflash'"


class OneWorker(Executor):
    """Starts a worker as `RayExecutorV2` does."""

    def _init_executor(self):
        variables = ENVIRONMENTS["not installed"]
        actor = ray.remote(num_cpus=0)(RayWorkerProc).options(runtime_env={"env_vars": variables})
        worker = actor.remote(vllm_config=self.vllm_config, rank=0, input_shm_handle=None, is_driver_worker=True)
        ray.get(worker.initialize_worker.remote(0, {}, "", dict(os.environ)), timeout=WAIT_S)

    def collective_rpc(self, *args, **kwargs):
        raise NotImplementedError

    def check_health(self):
        raise NotImplementedError


def test_the_engine_core_says_what_is_missing(cluster, config):
    address = ray.util.get_node_ip_address()
    with pytest.raises(RuntimeError) as caught:
        OneWorker(config)
    assert (
        f"a worker on {address} has no module vllm_dflash (not installed, or another version); install it in that "
        f"environment with pip (pip install vllm-dflash=={__version__})"
    ) in str(caught.value)
    assert isinstance(caught.value.__cause__, ray.exceptions.RayTaskError)
