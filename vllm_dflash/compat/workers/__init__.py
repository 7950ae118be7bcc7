# SPDX-License-Identifier: Apache-2.0
"""Every worker of an engine of ours has this plugin, the same one: or the engine does not start.

A worker without it would draft with vLLM's own dflash, and nobody would notice.
"""
