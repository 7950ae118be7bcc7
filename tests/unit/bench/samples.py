# SPDX-License-Identifier: Apache-2.0
"""Results made by hand: two systems, two prompt sets, two concurrencies, a failure, a note."""

from __future__ import annotations

from dataclasses import replace

from vllm_dflash.benchmark.metrics import AcceptanceCounts
from vllm_dflash.benchmark.records import Counters, RequestError, RequestRecord, ResponseAcceptance, Run
from vllm_dflash.benchmark.results import PromptSetInfo, Results, Settings

SETTINGS = Settings("vllm", 128, 0.0, 1.0, None, True, None, 1, 0, 600.0)
COUNTS = AcceptanceCounts(
    drafts=40,
    drafted_tokens=280,
    accepted_tokens=114,
    accepted_per_position=(32, 26, 20, 15, 11, 7, 3),
    drafted_per_position=(40, 40, 40, 40, 40, 40, 40),
)


def record(number: int = 0, tokens: int = 64, **changes: object) -> RequestRecord:
    fields: dict[str, object] = {"name": f"p{number}", "turn": 1, "sent": 0.0, "ended": 1.05, "prompt_tokens": 30}
    fields |= {"first_token": 0.05 + number / 100, "last_token": 1.0, "output_tokens": tokens}
    return RequestRecord(**(fields | changes))  # type: ignore[arg-type]


def run(system: str, dataset: str, concurrency: int, seconds: float, drafted: bool) -> Run:
    acceptance = ResponseAcceptance(3.6, 20, 52, 140) if drafted else None
    requests = tuple(record(number, acceptance=acceptance) for number in range(4))
    counters = Counters(COUNTS if drafted else None, 256, 0, 120, 30)
    return Run(system, dataset, concurrency, seconds, requests, counters)


def results() -> Results:
    runs = [
        run(system, dataset, concurrency, base / speed / concurrency**0.5, system == "server")
        for dataset, base in (("mini", 4.0), ("<b>own & set</b>", 3.0))
        for concurrency in (1, 8)
        for system, speed in (("baseline", 1.0), ("server", 2.4 if concurrency == 1 else 1.7))
    ]
    failed = record(9, error=RequestError("timeout", "no end after 1 s"))
    runs[-1] = replace(runs[-1], requests=(*runs[-1].requests, failed), notes=("a <script>note</script>",))
    sets = (PromptSetInfo("mini", "shipped", None, 4), PromptSetInfo("<b>own & set</b>", "own.jsonl", None, 4))
    environment = {"vllm_dflash": "0.1.0", "CPU": "hand-made"}
    return Results(
        "2026-11-26T12:00:00+00:00", "vllm-dflash bench --dataset mini", environment, SETTINGS, sets, tuple(runs),
        "baseline",
    )  # fmt: skip
