# `make` lists the targets. PYTHON=... picks the base interpreter (3.10 or newer).
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed.stamp
TEST_FLAGS := -q --no-header --timeout=300 --durations=10
# Two files of tests at a time: many tests wait for their ranks, others need one core.
SIDE_BY_SIDE := -n 2 --dist loadfile
DEMO_ARGS ?=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.DEFAULT_GOAL := help
.PHONY: help env demo test test-all test-gpu check format clean

help: ## list the targets (this text)
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

env: $(STAMP) ## make .venv and install what is pinned, once

$(STAMP): setup.py requirements-dev.txt tools/make_env.py
	@$(PYTHON) tools/make_env.py $(VENV)
	@touch $@

demo: $(STAMP) ## train, save, resume on other rank counts, compare (minutes; DEMO_ARGS="--steps 100")
	@$(BIN)/python -m launch.demo $(DEMO_ARGS)

test: $(STAMP) ## run the tests that need neither long nor a GPU
	@$(BIN)/python -m pytest tests -m "not slow and not gpu" $(TEST_FLAGS) $(SIDE_BY_SIDE)

test-all: $(STAMP) ## run every test, slow and GPU ones too; the output is kept in docs/test-all.txt
	@mkdir -p docs
	@$(BIN)/python -m pytest tests $(TEST_FLAGS) $(SIDE_BY_SIDE) -rs 2>&1 \
		| sed -u -e 's#$(CURDIR)/##g' -e "s#$$HOME#~#g" | tee docs/test-all.txt

test-gpu: $(STAMP) ## run the tests that need a GPU; the output is kept in docs/test-gpu.txt
	@mkdir -p docs
	@$(BIN)/python -m pytest tests/gpu $(TEST_FLAGS) -v -rs 2>&1 \
		| sed -u -e 's#$(CURDIR)/##g' -e "s#$$HOME#~#g" | tee docs/test-gpu.txt

check: $(STAMP) ## lint, check the format and the types, check the import directions
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy shard4bit launch
	@$(BIN)/python -m pytest tests/test_imports.py -q --no-header

format: $(STAMP) ## put the code into the common format
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

clean: ## remove what was built (not .venv)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
