# SPDX-License-Identifier: Apache-2.0
"""Draft trees in the V2 model runner: what a step has to know of them, and where it is told.

A step's order: `TreeModelState.prepare_inputs` (positions, who sees whom) -> `TreeAttention` in every target layer ->
`TreeSampler` (the target's way) -> `compaction` (the way's rows become consecutive) -> drafting.
"""

#: What its errors name.
FLAG = '--additional-config\'s "dflash": "tree"'
