# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of a drafting step, each beside its plain reference."""
