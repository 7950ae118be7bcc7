# SPDX-License-Identifier: Apache-2.0
"""What soak_gpu.py consists of.

The parent's side: `job` and `comparison`. The child's side: `child`, which is either the engine under test with its
`load` of `requests`, or the `reference`. `resources` is what may not be left over.
"""
