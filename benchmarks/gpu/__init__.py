# SPDX-License-Identifier: Apache-2.0
"""What the GPU benchmarks share: engines in processes of their own, and what a run says of itself.

Both sides: `names`. The parent's: `engine_process`, `pair`, `machine`, `output`. The child's: `engine_child`,
`engine_inside`. `decode/` belongs to decode_gpu.py, `soak/` to soak_gpu.py. Scripts beside this folder import it as
`gpu`, because a script's own folder is where Python looks first.
"""
