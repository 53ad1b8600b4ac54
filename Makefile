# `make demo` and `make test` need Python 3.11+, gcc and git, and set up everything else in .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCKED := -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo smol test test-all test-unit lint format bench clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## the virtual environment with everything pinned

$(STAMP): pyproject.toml constraints.txt
	@# Asked for pip, since an environment whose making was broken off has a Python and no pip.
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing pinned packages into $(VENV) (a few minutes, once) ..."
	@# Torch first: with its version fixed, nothing that follows asks for another build of it.
	$(BIN)/python -m pip install -q --disable-pip-version-check $(LOCKED) torch
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --disable-pip-version-check $(LOCKED) -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP) ## images to a served, tracked model: the recipe `tiny` into runs/demo
	@$(BIN)/python pipelines/demo.py

smol: $(STAMP) ## real weights and real images on a laptop, into runs/smol (docs/smol.md)
	@$(BIN)/python pipelines/fetch_smol.py --to runs/smol-assets
	@$(BIN)/python pipelines/full.py --recipe smol --storage runs/smol

# Two files of tests at a time; a Ray cluster wants the machine for itself.
PYTEST := $(BIN)/python -m pytest
TWICE := -n 2 --dist loadfile

test: $(STAMP) ## the tests
	$(PYTEST) $(TWICE) -m "not ray and not thorough"
	$(PYTEST) -m "ray and not thorough"

test-all: $(STAMP) ## and those that take long or repeat a proof for every setting
	$(PYTEST) $(TWICE) -m "not ray"
	$(PYTEST) -m ray

test-unit: $(STAMP) ## only what is quick and starts no cluster
	$(PYTEST) $(TWICE) -m "not slow and not ray and not thorough"

lint: $(STAMP) ## ruff, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=platform $(BIN)/lint-imports

format: $(STAMP) ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## the figures of docs/benchmarks.md, one script after the other
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python benchmarks/loss_memory.py
	$(BIN)/python benchmarks/throughput.py --compile
	$(BIN)/python benchmarks/vision_modes.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/wait.py
	$(BIN)/python benchmarks/resume.py
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/evaluate.py
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	    $(BIN)/python benchmarks/gpu_step.py && $(BIN)/python benchmarks/gpu_loss.py; \
	else echo "no CUDA GPU: gpu_step.py and gpu_loss.py are left out"; fi
	$(BIN)/python benchmarks/features.py --images 5000 --tower efficientnet_lite
	rm -rf runs/bench-tiny
	$(BIN)/python benchmarks/steps.py --recipe tiny --storage runs/bench-tiny

clean: ## forget runs/ (the virtual environment stays)
	rm -rf runs
