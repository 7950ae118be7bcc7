# SPDX-License-Identifier: Apache-2.0
"""What decode_gpu.py consists of.

The parent's side: `workload` (`shape`, `prompts`) and `job`, then `report`. The child's side: `child`, which runs a
`batch`, times the `draft_graph`, or takes a `trace`.
"""
