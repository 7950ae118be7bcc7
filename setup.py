# SPDX-License-Identifier: Apache-2.0
"""Shim for tools that still call setup.py. All metadata lives in pyproject.toml."""

from setuptools import setup

setup()
