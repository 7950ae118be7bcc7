# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster of two nodes on this machine, and `examples/ray_serve` on it as its README has it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.engines import ROOT, VLLM, environment
from tests.e2e.serving import free_port

EXAMPLE = ROOT / "examples" / "ray_serve"
RAY, SERVE = (str(Path(VLLM).with_name(name)) for name in ("ray", "serve"))
#: Of one engine's start beside another one under load, on busy cores; below the limit of a test.
TIMEOUT_S = 400
REQUEST_TIMEOUT_S = 60
#: Ray collects metrics so often.
REPORT_S = 4


class RayCluster:
    """Two nodes: their addresses."""

    def __init__(self) -> None:
        self.gcs, self.dashboard, *metrics = (f"127.0.0.1:{free_port()}" for _ in range(4))
        self.metrics = [f"http://{address}/metrics" for address in metrics]  # a page a node
        self.config: dict[str, Any] = {}  # that `example` has deployed

    def samples(self, name: str, pages: list[str] | None = None) -> dict[str, float]:
        """A metric of all nodes by replica, summed over its other labels."""
        found: dict[str, float] = defaultdict(float)
        for page in pages or self.metrics:
            for family in text_string_to_metric_families(httpx.get(page, timeout=60).text):
                for sample in family.samples:
                    if sample.name == name:
                        found[sample.labels["ReplicaId"]] += sample.value
        return found

    def replicas(self, state: str = "RUNNING") -> dict[int, str]:
        """Those of the example that are in this state: process id -> replica id."""
        answer = httpx.get(f"http://{self.dashboard}/api/serve/applications/", timeout=60)
        if answer.status_code != 200:  # Serve's controller has not started yet
            return {}
        applications = answer.json()["applications"]
        deployment = applications.get("vllm", {}).get("deployments", {}).get("VllmServer", {"replicas": []})
        return {r["pid"]: r["replica_id"] for r in deployment["replicas"] if r["state"] == state}

    def deploy_again(self, **deployment: Any) -> None:
        """As `serve deploy` does with these options of the deployment changed."""
        change(self.config, deployment)
        url = f"http://{self.dashboard}/api/serve/applications/"
        httpx.put(url, json=self.config, timeout=60).raise_for_status()


@contextlib.contextmanager
def ray_cluster(folder: Path) -> Iterator[RayCluster]:
    """Start `ray start` twice, and end what came of it."""
    cluster = RayCluster()
    # Paths of Unix sockets are short, so not in pytest's folder.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        env = environment(
            RAY_TMPDIR=ray_folder,
            RAY_AUTH_MODE="disabled",
            RAY_USAGE_STATS_ENABLED="0",
            RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0",
            # Counters travel as differences, and one that is not taken within half of this is lost for good.
            RAY_metrics_report_interval_ms=str(1000 * REPORT_S),
            RAY_process_group_cleanup_enabled="1",
            RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING="0",  # there is one endpoint for both nodes
            RAY_worker_niceness="0",  # the default is 15, and the clients would come first
            VLLM_USE_V2_MODEL_RUNNER="0",
            PYTHONPATH=f"{ROOT}:{EXAMPLE}",
        )
        first = ["--head", "--port", port(cluster.gcs), "--dashboard-port", port(cluster.dashboard)]
        nodes = [[*first, "--ray-client-server-port", str(free_port())], ["--address", cluster.gcs]]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for number, arguments in enumerate(nodes):
                command = [
                    RAY, "start", "--block", "--num-cpus", "1", "--object-store-memory", str(100 * 2**20),
                    "--dashboard-agent-listen-port", str(free_port()),
                    "--metrics-export-port", port(cluster.metrics[number]), *arguments,
                ]  # fmt: skip
                with (folder / f"node{number}.log").open("w") as log:
                    process = subprocess.Popen(
                        command, env=env, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                        start_new_session=True,
                    )  # fmt: skip
                processes.append(process)
                wait_for(lambda started=number + 1: num_nodes(cluster) == started, 240, folder / f"node{number}.log")
            yield cluster
        finally:
            for process in reversed(processes):
                end_session(process)


@contextlib.contextmanager
def example(cluster: RayCluster, folder: Path, **deployment: Any) -> Iterator[str]:
    """The README's `serve run` with its serve.yaml, on a free port and with these options changed: its URL."""
    config = yaml.safe_load((EXAMPLE / "serve.yaml").read_text())
    config["http_options"] |= {"port": free_port(), "request_timeout_s": REQUEST_TIMEOUT_S}
    change(config, deployment)
    cluster.config = config
    file, log = folder / "serve.yaml", folder / "serve.log"
    file.write_text(yaml.safe_dump(config))
    env = environment(RAY_ADDRESS=cluster.gcs, RAY_AUTH_MODE="disabled", PYTHONPATH=str(ROOT))
    with log.open("w") as stream:
        process = subprocess.Popen(
            [SERVE, "run", "--app-dir", str(EXAMPLE), str(file)],
            env=env, cwd=ROOT, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        running = lambda: process.poll() is not None or cluster.replicas()  # noqa: E731
        wait_for(running, TIMEOUT_S, log)
        assert process.poll() is None, log.read_text()[-3000:]
        yield f"http://127.0.0.1:{config['http_options']['port']}"
    finally:
        process.kill()  # the replicas end with the cluster
        process.wait(timeout=60)


def change(config: dict[str, Any], deployment: dict[str, Any]) -> None:
    """Options of the deployment; of its autoscaling, those that are named."""
    options = config["applications"][0]["deployments"][0]
    scaling = options["autoscaling_config"] | deployment.get("autoscaling_config", {})
    options |= deployment | {"autoscaling_config": scaling}


def wait_for(condition: Callable[[], Any], timeout_s: float, what: Any) -> None:
    """Raises TimeoutError with `what`: a sentence, or a log."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what.read_text()[-3000:] if isinstance(what, Path) else what)
        time.sleep(0.3)


def num_nodes(cluster: RayCluster) -> int:
    """Nodes that the dashboard knows to be alive; 0 before there is one."""
    try:
        answer = httpx.get(f"http://{cluster.dashboard}/api/v0/nodes", timeout=5)
    except httpx.TransportError:
        return 0
    return answer.text.count('"ALIVE"') if answer.status_code == 200 else 0


def port(address: str) -> str:
    return re.findall(r":(\d+)", address)[-1]


def is_alive(pid: int) -> bool:
    """Whether it runs: a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Ask a node to end, and kill whatever of its session is left."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == process.pid:
                os.kill(pid, signal.SIGKILL)
    process.wait(timeout=60)
