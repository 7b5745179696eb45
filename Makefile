# On a fresh machine: make demo, make test. Everything below uses the project's own environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTOS := $(shell find protos -name '*.proto')

.DEFAULT_GOAL := help
.PHONY: help install demo test check format protos bench gpu-test gpu-bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t12

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

# A GPU needs a torch of its own CUDA, which constraints.txt does not have. With PYTHON given (make
# gpu-test PYTHON=python3) that interpreter is used as it is, and nothing is installed.
ifeq ($(origin PYTHON),file)
GPU_PYTHON := $(BIN)/python
GPU_INSTALL := install
else
GPU_PYTHON := $(PYTHON)
GPU_INSTALL :=
endif
GPU_SHAPES ?= llama-3-8b,qwen3-0.6b,mistral-7b
GPU_THERE = $(GPU_PYTHON) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else \
	f"torch {torch.__version__} of {sys.executable} sees no GPU; another one: make $@ PYTHON=python3")'

# Warnings are no errors here: which torch there is, is not ours to say.
gpu-test: $(GPU_INSTALL) ## test the kernels and the engine on a CUDA GPU
	@$(GPU_THERE)
	$(GPU_PYTHON) -m pytest -W default tests/engine/gpu
	$(GPU_PYTHON) -m pytest -W default -m gpu tests --ignore tests/engine/gpu || [ $$? -eq 5 ]

gpu-bench: $(GPU_INSTALL) ## measure a CUDA GPU: MBU, MFU, kernels, and transformers beside
	@$(GPU_THERE)
	$(GPU_PYTHON) -m benchmarks.gpu --shapes $(GPU_SHAPES) --out docs/performance/gpu; \
	status=$$?; $(GPU_PYTHON) -m benchmarks.gpu report && exit $$status

clean: ## remove the environment and caches
	rm -rf $(VENV) .tools build *.egg-info .pytest_cache .mypy_cache .ruff_cache
