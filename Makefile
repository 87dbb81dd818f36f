# Every target sets up .venv first, when and only when the pinned dependencies changed.
# The first Python that runs and is new enough; a name on the PATH may be a shim with nothing behind it.
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$name; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup test test-gpu lint smoke readme bench bench-kernels bench-decode clean

help:  ## this list
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z%-]+):.*## (.*)/  make \1\t\2/' | expand -t 28

setup: $(STAMP)  ## create .venv and install what pyproject.toml and constraints.txt pin

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and none was found; name one: make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "installing the pinned dependencies into $(VENV) (a few minutes, once)"
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	@touch $@

reproduce-%: $(STAMP)  ## measure a suite (table1) on the mini profile and write its table; ARGS="profile=paper ..." for more
	$(BIN)/vidkv reproduce $* $(ARGS)

test: $(STAMP) lint  ## all tests, with an end-to-end smoke run of both mini models
	$(BIN)/python -m pytest

test-gpu: $(STAMP)  ## kernels, compiled, on this machine's GPU; fails without one
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/gpu

lint: $(STAMP)  ## style
	$(BIN)/ruff check .

smoke: $(STAMP)  ## two samples of each mini suite through the real program
	$(BIN)/vidkv reproduce smoke

readme: $(STAMP)  ## put the recorded table into README.md
	$(BIN)/python scripts/update_readme.py

bench: $(STAMP)  ## time and peak memory of table 1 on this machine
	$(BIN)/python scripts/bench_table1.py results/mini/bench_table1.md

bench-kernels: $(STAMP)  ## time of the kernels on this machine's GPU, beside full precision
	$(BIN)/python scripts/bench_kernels.py results

bench-decode: $(STAMP)  ## time of whole decode steps of a 7B model on this machine's GPU
	$(BIN)/python scripts/bench_decode.py results

clean:  ## forget the cells of this machine (runs/) and caches; results/ and .venv stay
	rm -rf runs .pytest_cache .ruff_cache
