# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_dflash`: the command line, for launchers that want a module."""

from vllm_dflash.cli import main

if __name__ == "__main__":
    main()
