# SPDX-License-Identifier: Apache-2.0
"""`vllm-dflash top URL`: a running server at a glance, from its /metrics alone.

`polling` (fetch) -> `snapshot` (what counts in it) -> `window` (what has happened lately) -> `screen`. Knows the names
of vLLM's metrics and of the plugin's, and nothing else of either.
"""
