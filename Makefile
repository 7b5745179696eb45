# On a fresh machine: make demo, make test. Everything below uses the project's own environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTOS := $(shell find protos -name '*.proto')

.DEFAULT_GOAL := help
.PHONY: help install demo test check format protos bench clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t12

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	@touch $@ $(VENV)/.compiled

# The compiled CPU backend, again when its sources change; without a compiler torch does its work.
$(VENV)/.compiled: setup.py $(wildcard engine/native/src/*) | $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

install: $(VENV)/.installed $(VENV)/.compiled ## make the environment, and build what is compiled

demo: install ## start a local cluster and stream answers from the demo model
	$(BIN)/baton demo

test: install ## run the whole suite
	$(BIN)/python -m pytest

check: install ## format, lint, types, import rules, proto lint, generated code fresh
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy tools
	$(BIN)/lint-imports
	$(BIN)/python tools/protos.py check

format: install ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: install ## regenerate the stubs from protos/
	$(BIN)/python tools/protos.py generate

bench: install ## measure the engine on a random 135M Llama
	$(BIN)/baton bench engine

clean: ## remove the environment and caches
	rm -rf $(VENV) .tools build *.egg-info .pytest_cache .mypy_cache .ruff_cache
