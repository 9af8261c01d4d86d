# make demo: the whole pipeline on a small GPT in a few minutes.  make test: lint, types, contracts, tests, docs.
# Both build .venv with pinned versions (constraints.txt). torch goes first, so that nothing else decides its version; for a CPU build
# where the registry serves CUDA ones, install torch into .venv from a CPU index before.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint types contracts docs-check bench clean

demo: $(VENV)/.runtime
	$(BIN)/moeify demo --out demo-out --overwrite

test: $(VENV)/.dev lint types contracts docs-check
	$(BIN)/python -m pytest -q

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

contracts: $(VENV)/.dev
	$(BIN)/lint-imports

docs-check: $(VENV)/.dev
	$(BIN)/python scripts/check_docs.py
	$(BIN)/python scripts/families.py --check

bench: $(VENV)/.dev
	$(PIP) -e '.[bench]'
	$(BIN)/python -m bench.run split --json bench/results/split.jsonl
	$(BIN)/python -m bench.run grouped --json bench/results/grouped.jsonl

$(VENV)/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[report]'
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-out build dist src/*.egg-info .mypy_cache .ruff_cache
