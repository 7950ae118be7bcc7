# SPDX-License-Identifier: Apache-2.0
"""All patches, in one list. Each waits for its module to be imported, so that registering costs nothing."""

from __future__ import annotations

from types import ModuleType

from wrapt import register_post_import_hook

_installed = False


def install() -> None:
    """Arrange every patch once per process."""
    global _installed
    if _installed:
        return
    _installed = True
    register_post_import_hook(_engine_args, "vllm.engine.arg_utils")
    register_post_import_hook(_config, "vllm.config.vllm")
    register_post_import_hook(_speculative, "vllm.config.speculative")
    register_post_import_hook(_runner_v1, "vllm.v1.worker.gpu_model_runner")
    register_post_import_hook(_runner_v2, "vllm.v1.worker.gpu.model_runner")
    register_post_import_hook(_executor, "vllm.v1.executor.abstract")
    register_post_import_hook(_scheduler, "vllm.v1.core.sched.scheduler")
    register_post_import_hook(_rejection_cpu, "vllm.v1.sample.rejection_sampler")
    register_post_import_hook(_prometheus, "vllm.v1.metrics.loggers")
    register_post_import_hook(_prometheus_ray, "vllm.v1.metrics.ray_wrappers")


def _engine_args(module: ModuleType) -> None:
    from vllm_dflash.compat import engine_args

    engine_args.install(module)


def _config(module: ModuleType) -> None:
    from vllm_dflash.compat import capture_sizes, config

    config.install(module)
    capture_sizes.install(module)


def _speculative(module: ModuleType) -> None:
    from vllm_dflash.compat import drafting_slots

    drafting_slots.install(module)


def _runner_v1(module: ModuleType) -> None:
    from vllm_dflash.compat import select_v1
    from vllm_dflash.compat.metrics import runners

    select_v1.install(module)
    runners.install_v1(module)


def _runner_v2(module: ModuleType) -> None:
    from vllm_dflash.compat import select_v2
    from vllm_dflash.compat.metrics import runners

    select_v2.install(module)
    runners.install_v2(module)


def _executor(module: ModuleType) -> None:
    from vllm_dflash.compat.workers import executor

    executor.install(module)


def _scheduler(module: ModuleType) -> None:
    from vllm_dflash.compat import prefill_cadence
    from vllm_dflash.compat.metrics import scheduler

    scheduler.install(module)
    prefill_cadence.install(module)


def _rejection_cpu(module: ModuleType) -> None:
    from vllm_dflash.compat import rejection_cpu

    rejection_cpu.install(module)


def _prometheus(module: ModuleType) -> None:
    from vllm_dflash.compat.metrics import prometheus

    prometheus.install(module)


def _prometheus_ray(module: ModuleType) -> None:
    from vllm_dflash.compat.metrics import prometheus

    prometheus.install_ray(module)
