# SPDX-License-Identifier: Apache-2.0
"""The only room that knows vLLM's versions and runners.

House rules: a patch replaces one name in one place, through `patching.replace`; it says why it is needed, what it adds
and when it can go; vLLM's attributes are read directly, so that a change upstream fails loudly.
"""
