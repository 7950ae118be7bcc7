# SPDX-License-Identifier: Apache-2.0
"""`vllm-dflash doctor`: whether a target and a drafter can work together, told from their files.

facts.py says what is looked at, reading.py reads it, checks/ judges it, measure.py runs the pair, report.py shows it.
"""
