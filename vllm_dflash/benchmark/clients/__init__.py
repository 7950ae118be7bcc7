# SPDX-License-Identifier: Apache-2.0
"""Measuring a running server over HTTP: its streams, its counters, many conversations at once."""
