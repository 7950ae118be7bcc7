# SPDX-License-Identifier: Apache-2.0
"""Run-time metrics beside vLLM's own: what drafting does, on its way from the worker to /metrics.

`meter` (times a step, counts fall-backs, in the worker) -> `report` on the runner's output (`runners`) -> the
scheduler's process (`scheduler`, which also warns in the log: `watch`) -> `wire`, inside vLLM's SpecDecodingStats ->
`prometheus`, in every process that serves /metrics. With vLLM's statistics switched off it ends at the scheduler.
"""
