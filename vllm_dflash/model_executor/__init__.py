# SPDX-License-Identifier: Apache-2.0
"""The model side: target features in, context K/V into the paged cache, block rows to hidden states."""
