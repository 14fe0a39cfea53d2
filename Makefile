# `make` lists the targets. Each sets up what it needs: a virtual environment in $(VENV), filled once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Nothing here may look for a model hub or a tracking server.
export HF_HUB_OFFLINE = 1
export WANDB_MODE = offline
export TOKENIZERS_PARALLELISM = false
export PIP_DISABLE_PIP_VERSION_CHECK = 1

SETUP := setup.cfg pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check notebooks clean

help:  ## what can be made
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: $(SETUP) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/test.stamp: $(SETUP) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

demo: $(VENV)/demo.stamp  ## a private run on a real model and real reviews, about 3 minutes
	$(BIN)/hf-dp demo

.PHONY: lint
lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One process for each core, each with one thread: the models are too small for more.
test check: export OMP_NUM_THREADS = 1
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist worksteal

test: lint  ## everything that needs no accelerator
	$(PYTEST) -m "not gpu"

check: lint  ## the quick part of it, before each commit
	$(PYTEST) -m "not slow and not gpu"

notebooks: $(VENV)/test.stamp  ## run the notebooks and keep their figures
	$(BIN)/python notebooks/execute.py

clean:  ## remove what the targets made
	rm -rf $(VENV) .ci-venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find hf_dp tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
