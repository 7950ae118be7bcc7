# SPDX-License-Identifier: Apache-2.0
"""What a reader of a run's numbers must know, found in the run itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vllm_dflash.benchmark.measures import DRAFTS, summarise
from vllm_dflash.benchmark.records import Run


def with_notes(run: Run, notes: Sequence[str] = ()) -> Run:
    """The run with `notes` and with what its size and its counters give away."""
    where = f"{run.system}, {run.dataset} at concurrency {run.concurrency}"
    found = [*notes]
    conversations = sum(record.turn == 1 for record in run.requests)  # names may be the same
    if conversations < run.concurrency and not run.interrupted:
        found.append(f"{where}: {conversations} prompts cannot keep {run.concurrency} requests in flight.")
    summary = summarise(run)
    counted = run.counters.output_tokens if run.counters else None
    if counted is not None and not summary.errors and counted != summary.output_tokens:
        found.append(
            f"{where}: the server counted {counted} output tokens, these requests got {summary.output_tokens}: its "
            "counters hold other traffic too, and so do the figures of acceptance."
        )
    if run.counters is not None and summary.errors:
        failed = f"{sum(summary.errors.values())} of {summary.requests} requests failed"
        found.append(
            f"{where}: {failed}. What the server did for them is in its counters, "
            "and so in the figures of acceptance, prefix hits and preemptions that come from these."
        )
    if summary.position_divisor == DRAFTS and summary.position_rates:
        found.append(
            f"{run.system}: acceptance by position divides by all drafts. Where drafts were of different lengths, late "
            "positions are biased low."
        )
    return replace(run, notes=tuple(found))
