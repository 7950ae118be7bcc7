# SPDX-License-Identifier: Apache-2.0
"""vLLM's own OpenAI server as a Ray Serve deployment: N replicas of an engine behind one endpoint.

The arguments are those of `vllm serve`, in serve.yaml's `args`. Everything else of the deployment (replicas,
autoscaling, health checks, resources) stands under `deployments` there.
"""

import argparse
import shlex
from types import SimpleNamespace
from typing import Any, NoReturn

from pydantic import BaseModel
from ray import serve


class AppArgs(BaseModel, extra="forbid"):
    """serve.yaml's `args`."""

    vllm_serve: str  # what would stand behind `vllm serve` on a command line


def build(args: AppArgs) -> serve.Application:
    """What serve.yaml's `import_path` names."""
    return VllmServer.bind(args.vllm_serve)


@serve.deployment
@serve.ingress()
class VllmServer:
    """One replica: one engine, and vLLM's FastAPI app in front of it. vLLM is imported on the replica's node only."""

    def __init__(self, arguments: str) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

        self.args = parse(arguments)
        self.engine = AsyncLLM.from_vllm_config(
            AsyncEngineArgs.from_cli_args(self.args).create_engine_config(),
            stat_loggers=[RayPrometheusStatLogger],  # to Ray's metrics page, with the replica's id
            enable_log_requests=self.args.enable_log_requests,
            disable_log_stats=self.args.disable_log_stats,
        )

    async def __serve_build_asgi_app__(self) -> Any:
        """Called by Serve once the constructor is through."""
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        tasks = await self.engine.get_supported_tasks()
        app = build_app(self.args, tasks, self.engine.model_config)
        await init_app_state(self.engine, app.state, self.args, tasks)
        # vLLM's error handler tells its HTTP server to stop when the engine is dead. Here check_health() does that.
        app.state.server = SimpleNamespace()
        return app

    async def check_health(self) -> None:
        """Called by Serve every health_check_period_s; raises once the engine is dead, and the replica is replaced."""
        await self.engine.check_health()

    def __del__(self) -> None:
        """Called by Serve when a replica has drained."""
        if hasattr(self, "engine"):
            self.engine.shutdown()


def parse(arguments: str) -> argparse.Namespace:
    """As `vllm serve` reads them. Raises ValueError, which `serve status` shows."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(f"args: vllm_serve: {message}")

    args = make_arg_parser(Parser()).parse_args(shlex.split(arguments))
    args.model = args.model_tag or args.model
    validate_parsed_serve_args(args)
    return args
