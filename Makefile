# Every target sets up .venv first, when and only when the pinned dependencies changed.
PYTHON ?= $(shell command -v python3.13 || command -v python3.12 || command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup test test-fast lint smoke bench clean

help:  ## this list
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z%-]+):.*## (.*)/  make \1\t\2/' | expand -t 28

setup: $(STAMP)  ## create .venv and install what pyproject.toml and constraints.txt pin

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}; name another one: make PYTHON=...")'
	@echo "installing the pinned dependencies into $(VENV) (a few minutes, once)"
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	@touch $@

reproduce-%: $(STAMP)  ## measure a suite (table1) on the mini profile and write its table; ARGS="profile=paper ..." for more
	$(BIN)/vidkv reproduce $* $(ARGS)

test: $(STAMP) lint  ## all tests, with an end-to-end smoke run of both mini models
	$(BIN)/python -m pytest

lint: $(STAMP)  ## style
	$(BIN)/ruff check .

smoke: $(STAMP)  ## two samples of each mini suite through the real program
	$(BIN)/vidkv reproduce smoke

bench: $(STAMP)  ## time and peak memory of table 1 on this machine
	$(BIN)/python scripts/bench_table1.py results/mini/bench_table1.md

clean:  ## forget the cells of this machine (runs/) and caches; results/ and .venv stay
	rm -rf runs .pytest_cache .ruff_cache
