# SPDX-License-Identifier: Apache-2.0
"""Which paged caches this package's kernels can write."""

#: Attention backends whose caches are [blocks, heads, slots in a block, 2*D] and whose forward writes none of them.
CACHE_LAYOUT_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")
#: Values of --kv-cache-dtype: the model's own type, or float8_e4m3fn with one scale a layer.
CACHE_DTYPES = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3")
