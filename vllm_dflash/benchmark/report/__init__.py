# SPDX-License-Identifier: Apache-2.0
"""The results as one page: plots drawn by matplotlib, laid out by jinja2, nothing loaded from anywhere."""
