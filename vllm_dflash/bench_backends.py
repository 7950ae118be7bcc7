# SPDX-License-Identifier: Apache-2.0
"""What `vllm-dflash bench` is asked to do: its options, what excludes what, and the runs that each backend makes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vllm_dflash.benchmark.clients.requests import Endpoint, Messages
from vllm_dflash.benchmark.clients.server import run_servers
from vllm_dflash.benchmark.clients.serving import Server, served_model
from vllm_dflash.benchmark.job import LoadJob
from vllm_dflash.benchmark.offline_load import OWN_ARGUMENTS
from vllm_dflash.benchmark.offline_runs import PLAIN, SYSTEMS, run_offline
from vllm_dflash.benchmark.records import RequestRecord, Run
from vllm_dflash.benchmark.sets import PromptSet
from vllm_dflash.benchmark.templates import load_chat_tokenizer, templated_text
from vllm_dflash.console import new_log_directory, require_vllm, resolve_num_speculative_tokens, resolve_pair

SERVERS = ("vllm", "sglang")
BACKENDS = (*SERVERS, "offline", "transformers")


@dataclass(frozen=True)
class BenchOptions:
    """The command's options; their meanings are its help. None: not given."""

    backend: str
    datasets: tuple[str, ...] = ("mini",)
    revisions: Mapping[str, str] = field(default_factory=dict)
    concurrencies: tuple[int, ...] = (1,)
    num_prompts: int | None = None
    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    thinking: bool | None = None
    chat: bool = True
    warm_up: int = 1
    seed: int = 0
    timeout_seconds: float = 600.0
    base_url: str | None = None
    metrics_url: str | None = None
    baseline_url: str | None = None
    baseline: Path | None = None
    model: str | None = None
    api: str = "openai"
    tokenizer: str | None = None
    target: str | None = None
    drafter: str | None = None
    num_speculative_tokens: int | None = None
    dtype: str = "auto"
    systems: tuple[str, ...] = tuple(SYSTEMS)
    engine_args: Mapping[str, Any] = field(default_factory=dict)


class Display(Protocol):
    """Shows how far a benchmark has got."""

    def start(self, system: str, what: str, concurrency: int, num_requests: int) -> None: ...

    def record(self, record: RequestRecord) -> None: ...


@dataclass(frozen=True)
class Plan:
    """The runs of a benchmark, made one after the other; and the system among them that speed-ups are relative to.

    The others are what will be measured, as far as it is known here: fields as in `Settings`.
    """

    runs: Callable[[Display], Generator[Run, None, None]]
    model: str
    baseline: str | None = None
    drafter: str | None = None
    num_speculative_tokens: int | None = None
    dtype: str | None = None
    api: str | None = None


def check_options(options: BenchOptions) -> None:
    """Raises ValueError naming the flags that do not go together."""
    server = options.backend in SERVERS
    urls = {
        "--metrics-url": options.metrics_url,
        "--baseline-url": options.baseline_url,
        "--base-url": options.base_url,
    }
    for flag, value in (urls | {"--model": options.model, "--tokenizer": options.tokenizer}).items():
        if value is not None and not server:
            raise ValueError(f"{flag} {value}: only a server has one, and --backend is {options.backend}")
    own = {
        "--target": options.target,
        "--drafter": options.drafter,
        "--num-speculative-tokens": options.num_speculative_tokens,
    }
    for flag, given in own.items():
        if given is not None and server:
            raise ValueError(f"{flag} {given}: a running server has its own; it goes with --backend offline")
    if options.baseline_url and options.baseline:
        raise ValueError("--baseline-url and --baseline exclude each other: one baseline is needed")
    if options.thinking is not None and not options.chat:
        raise ValueError("--thinking and --no-thinking need --chat: without a template nothing reads them")
    if options.api == "generate" and options.backend != "sglang":
        raise ValueError(f"--api generate: is SGLang's, and --backend is {options.backend}")
    if options.backend == "transformers" and options.concurrencies != (1,):
        raise ValueError(f"--concurrency {_listed(options.concurrencies)}: --backend transformers runs 1 at a time")
    if options.backend == "transformers" and options.num_speculative_tokens is not None:
        raise ValueError("--num-speculative-tokens: --backend transformers drafts whole blocks")
    if options.engine_args and options.backend != "offline":
        raise ValueError(f"--engine-args: are vLLM's LLM(...)'s, and --backend is {options.backend}")
    if taken := sorted(set(OWN_ARGUMENTS) & set(options.engine_args)):
        raise ValueError(f"--engine-args: {taken[0]} is set by the benchmark itself; see --help for its option")
    unknown = sorted(set(options.revisions) - set(options.datasets))
    if unknown:
        raise ValueError(f"--dataset-revision {unknown[0]}=...: no --dataset {unknown[0]} was given")
    for flag, url in urls.items():
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError(f"{flag} {url}: a URL that begins with http:// or https:// is needed")


def _listed(values: Sequence[int]) -> str:
    return ",".join(map(str, values))


def planned_runs(options: BenchOptions, sets: Sequence[PromptSet]) -> Plan:
    """Raises ValueError or CommandError for what can be seen before anything runs."""
    if options.backend in SERVERS:
        return _server_plan(options, sets)
    return _offline_plan(options, sets) if options.backend == "offline" else _transformers_plan(options, sets)


def _server_plan(options: BenchOptions, sets: Sequence[PromptSet]) -> Plan:
    default = {"vllm": "http://127.0.0.1:8000", "sglang": "http://127.0.0.1:30000"}[options.backend]
    server = _server(options, "--base-url", options.base_url or default, "server", options.metrics_url)
    servers = [server]
    if options.baseline_url:
        servers.insert(0, _server(options, "--baseline-url", options.baseline_url, "baseline", None))
    return Plan(
        lambda display: run_servers(
            servers, sets, options.concurrencies, options.warm_up, display.start, display.record
        ),
        model=server.endpoint.model,
        baseline="baseline" if options.baseline_url else None,
        api=server.endpoint.api,
    )


def _server(options: BenchOptions, flag: str, url: str, system: str, metrics_url: str | None) -> Server:
    url = url.rstrip("/").removesuffix("/v1")
    model = options.model or served_model(url, flag)
    api = "generate" if options.api == "generate" else "chat" if options.chat else "completions"
    endpoint = Endpoint(
        base_url=url,
        model=model,
        api=api,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        timeout_seconds=options.timeout_seconds,
        thinking=options.thinking if api == "chat" else None,
        template=_template(options, model) if api == "generate" and options.chat else None,
    )
    return Server(system, endpoint, metrics_url or f"{url}/metrics", salted=options.backend == "vllm")


def _template(options: BenchOptions, model: str) -> Callable[[Messages], str]:
    """SGLang's `/generate` takes text, so the chat template is applied here."""
    tokenizer = load_chat_tokenizer("--tokenizer", options.tokenizer or model)
    return lambda messages: templated_text(tokenizer, messages, options.thinking)


def _offline_plan(options: BenchOptions, sets: Sequence[PromptSet]) -> Plan:
    require_vllm()
    target, drafter = resolve_pair(options.target, options.drafter)
    job = LoadJob(
        target=target,
        loads=(),
        drafter=drafter,
        num_speculative_tokens=resolve_num_speculative_tokens(drafter, options.num_speculative_tokens),
        dtype=options.dtype,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        chat=options.chat,
        thinking=options.thinking,
        warm_up=options.warm_up,
        timeout_seconds=options.timeout_seconds,
        engine_args=dict(options.engine_args),
    )
    if options.chat and "tokenizer_mode" not in options.engine_args:  # another mode's template is vLLM's own to find
        trust = bool(options.engine_args.get("trust_remote_code"))
        load_chat_tokenizer("--target", options.engine_args.get("tokenizer") or target, trust_remote_code=trust)
    systems = [SYSTEMS[name] for name in options.systems]
    logs = new_log_directory()
    return Plan(
        lambda display: run_offline(job, systems, sets, options.concurrencies, logs, display.start, display.record),
        model=target,
        baseline=PLAIN if PLAIN in systems and not options.baseline else None,
        drafter=drafter,
        num_speculative_tokens=job.num_speculative_tokens,
        dtype=options.dtype,
    )


def _transformers_plan(options: BenchOptions, sets: Sequence[PromptSet]) -> Plan:
    from vllm_dflash.benchmark.transformers_runs import PLAIN as GENERATE
    from vllm_dflash.benchmark.transformers_runs import TransformersJob, run_transformers

    target, drafter = resolve_pair(options.target, options.drafter)
    if options.chat:
        load_chat_tokenizer("--target", target)
    job = TransformersJob(
        target, drafter, options.dtype, options.max_tokens, options.temperature, options.top_p, options.seed,
        options.chat, options.thinking, options.warm_up,
    )  # fmt: skip
    return Plan(
        lambda display: run_transformers(job, sets, display.start, display.record),
        model=target,
        baseline=None if options.baseline else GENERATE,
        drafter=drafter,
        dtype=options.dtype,
    )
