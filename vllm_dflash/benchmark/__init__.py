# SPDX-License-Identifier: Apache-2.0
"""Measuring engines from the outside: an offline engine in a process of its own, prompt sets, metrics.

Whatever runs here is a plain user of vLLM: nothing in this room knows how the drafter is wired in.
"""
