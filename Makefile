# SPDX-License-Identifier: Apache-2.0
# `make help` lists the targets. Variables: PYTHON, EXTRAS, TORCH_INDEX_URL (see scripts/setup_env.sh), ARGS.

VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

export VENV

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint format typecheck clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1|/' | awk -F'|' '{ printf "  %-10s %s\n", $$1, $$2 }'

# The script itself decides, in milliseconds, whether there is anything to do: it also sees what timestamps do not
# show, a moved or half-made environment.
venv: ## Create or repair .venv; does nothing when it is up to date
	@scripts/setup_env.sh

demo: venv ## Generate without and with DFlash, side by side (ARGS="--max-tokens 64")
	@$(BIN)/vllm-dflash demo $(ARGS)

# Kernel tests run in Triton's interpreter where there is no GPU, which takes a process of its own.
NO_TESTS_CHOSEN := 5
test: venv ## Run the tests (ARGS="-k metrics")
	$(BIN)/python -m pytest --ignore=tests/kernels $(ARGS) || [ $$? -eq $(NO_TESTS_CHOSEN) ]
	$(BIN)/python -m pytest tests/kernels $(ARGS) || [ $$? -eq $(NO_TESTS_CHOSEN) ]

lint: venv ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv ## Fix style and formatting in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: venv ## Check types
	$(BIN)/mypy

clean: ## Remove builds and caches (.venv stays)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
