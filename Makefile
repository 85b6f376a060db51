# Every target sets up what it needs in .venv by itself; a second call skips what is already there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Every file is checked against its sha256 in requirements/. What has no wheel is built by the pinned setuptools.
PINNED := PIP_USE_PEP517=1 $(PIP) --require-hashes --no-deps --no-build-isolation
# Of large packages little is ever imported: Python makes byte code of that, and to make all of it takes a minute.
AS_NEEDED := --no-compile
SELF := $(PIP) --no-deps --no-build-isolation -e .
PINS := pyproject.toml $(wildcard requirements/*.txt)
AUDIT := $(VENV)/audit
# Others' clients do not go together, and are no part of what is pinned: each lies in an environment of its own.
CLIENTS := guidellm aiperf inference-perf genai-bench
CLIENT_client-guidellm := guidellm==0.8.*
CLIENT_client-aiperf := aiperf==0.13.*
CLIENT_client-inference-perf := inference-perf==0.7.*
CLIENT_client-genai-bench := genai-bench==0.0.5
PYTHON_client-inference-perf := python3.12
client = $(VENV)-clients/$(1:client-%=%)/bin/python

# Where it is set, hundreds of processes that the tests start would each compile the sources.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: $(addprefix client-,$(CLIENTS))
.PHONY: help run test test-fast check bench faults sweep live serve clients models audit sbom pins clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMPS)/core: $(PINS) | $(BIN)/python
	$(PINNED) -r requirements/build.txt
	$(PINNED) -r requirements/core.txt
	$(SELF)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/test: $(STAMPS)/core
	$(PINNED) $(AS_NEEDED) -r requirements/sweep.txt -r requirements/trace.txt -r requirements/serve.txt -r requirements/test.txt
	@touch $@ $(STAMPS)/sweep $(STAMPS)/serve

$(STAMPS)/serve: $(STAMPS)/core
	$(PINNED) $(AS_NEEDED) -r requirements/sweep.txt -r requirements/trace.txt -r requirements/serve.txt
	@touch $@

$(STAMPS)/sweep: $(STAMPS)/core
	$(PINNED) $(AS_NEEDED) -r requirements/sweep.txt
	@touch $@

# torch has no digest: which of its builds is right depends on the machine.
$(STAMPS)/live: $(STAMPS)/core
	$(PINNED) $(AS_NEEDED) -r requirements/live.txt
	$(PIP) $(AS_NEEDED) -c requirements/torch.txt torch
	@touch $@

# The tools that look at the environment lie in one of their own.
$(STAMPS)/audit: $(PINS) | $(BIN)/python
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements/audit.txt
	@mkdir -p $(STAMPS) && touch $@

run: $(STAMPS)/core  ## install the core and run the quickstart experiment
	$(BIN)/python -m helios_sim

check: $(STAMPS)/test  ## lint, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(STAMPS)/test  ## everything in check, then all tests, those of live models included (torch)
	$(MAKE) -j 2 check $(STAMPS)/live  # which types and contracts do not look at
	$(BIN)/python -m pytest -n auto --benchmark-disable

test-fast: $(STAMPS)/test  ## lint, and the tests that need no torch and no more than a minute on two cores
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n auto -m "not live and not slow and not exhaustive and not bench"

bench: $(STAMPS)/test  ## speed measurements, and the table experiments/speed/bench.md (needs the shared data)
	$(BIN)/python -m pytest -m bench -n 0 --benchmark-columns=min,median,iqr,rounds
	$(BIN)/python experiments/speed/bench.py

faults: $(STAMPS)/live $(STAMPS)/test  ## damaged files, kills of commands, injected faults, faults of the machine (two hours)
	$(BIN)/python experiments/faults/mutants.py
	$(BIN)/python experiments/faults/kills.py
	$(BIN)/python experiments/faults/inject.py
	$(BIN)/python experiments/faults/machine.py

sweep: $(STAMPS)/sweep  ## add Optuna and Ray to the same .venv

live: $(STAMPS)/live  ## add torch and transformers to the same .venv

serve: $(STAMPS)/serve  ## add FastAPI, uvicorn and what else python -m helios_sim.serve needs

clients: $(addprefix client-,$(CLIENTS))  ## benchmark clients for a server, each in an environment of its own (8 GB)

$(addprefix client-,$(CLIENTS)):
	$(or $(PYTHON_$@),$(PYTHON)) -m venv $(VENV)-clients/$(@:client-%=%)
	$(call client,$@) -m pip install --quiet --disable-pip-version-check '$(CLIENT_$@)'

audit: $(STAMPS)/audit  ## look up known vulnerabilities of every pinned version; fails where it cannot ask PyPI
	$(AUDIT)/bin/pip-audit --strict --disable-pip --require-hashes $(addprefix -r ,$(filter-out %/torch.txt,$(wildcard requirements/*.txt)))
	$(AUDIT)/bin/pip-audit --strict --disable-pip --no-deps -r requirements/torch.txt

sbom: $(STAMPS)/core $(STAMPS)/audit  ## a bill of materials of what is installed in .venv: dist/sbom.cdx.json (CycloneDX)
	@mkdir -p dist
	$(AUDIT)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON -o dist/sbom.cdx.json $(BIN)/python

pins: $(STAMPS)/audit  ## write requirements/ anew after a change of dependencies; UPGRADE=--upgrade: newer versions
	$(AUDIT)/bin/python requirements/lock.py $(UPGRADE)

models: $(STAMPS)/core  ## fetch the weights of the small open models, and prompts, into the cache, sha256 checked
	$(BIN)/python -m calibrate.models

clean:  ## remove the environment and what tools left behind
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
