# Every target sets up what it needs in .venv by itself; a second call skips what is already there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
STAMPS := $(VENV)/.stamps
PINS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help run test test-fast check bench faults sweep live models clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMPS)/core: $(PINS) | $(BIN)/python
	$(INSTALL) -e .
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/test: $(PINS) | $(BIN)/python
	$(INSTALL) -e '.[test,sweep]'
	@mkdir -p $(STAMPS) && touch $@ $(STAMPS)/core

$(STAMPS)/sweep: $(PINS) | $(BIN)/python
	$(INSTALL) -e '.[sweep]'
	@mkdir -p $(STAMPS) && touch $@ $(STAMPS)/core

$(STAMPS)/live: $(PINS) | $(BIN)/python
	$(INSTALL) -e '.[live]'
	@mkdir -p $(STAMPS) && touch $@ $(STAMPS)/core

run: $(STAMPS)/core  ## install the core and run the quickstart experiment
	$(BIN)/python -m helios_sim

check: $(STAMPS)/test  ## lint, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check $(STAMPS)/live  ## everything in check, then all tests, those of live models included (torch)
	$(BIN)/python -m pytest -n auto --benchmark-disable

test-fast: $(STAMPS)/test  ## lint, and the tests that need no torch and no more than a minute on two cores
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n auto -m "not live and not slow and not exhaustive and not bench"

bench: $(STAMPS)/test  ## speed measurements, and the table experiments/speed/bench.md (needs the shared data)
	$(BIN)/python -m pytest -m bench -n 0 --benchmark-columns=min,median,iqr,rounds
	$(BIN)/python experiments/speed/bench.py

faults: $(STAMPS)/live $(STAMPS)/test  ## damaged files for every loader, and kills of studies and sweeps (most of an hour)
	$(BIN)/python experiments/faults/mutants.py
	$(BIN)/python experiments/faults/kills.py

sweep: $(STAMPS)/sweep  ## add Optuna and Ray to the same .venv

live: $(STAMPS)/live  ## add torch and transformers to the same .venv

models: $(STAMPS)/core  ## fetch the weights of the small open models, and prompts, into the cache, sha256 checked
	$(BIN)/python -m calibrate.models

clean:  ## remove the environment and what tools left behind
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
