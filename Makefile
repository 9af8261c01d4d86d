# make demo: the whole pipeline on a small GPT in a few minutes.  make test: lint, types, contracts, tests, docs.
# Both build .venv with pinned versions (constraints.txt). torch goes first, so that nothing else decides its version; for a CPU build
# where the registry serves CUDA ones, install torch into .venv from a CPU index before.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# What `make bench` runs, and whose folder of bench/results it writes; local is ignored by git.
CASES  ?= split grouped exactness moe_ffn_cpu sparse_linear_cpu neuron_ffn_cpu generate_cpu generate_sparse_cpu enforcement compare
DEVICE ?= local
# Folder of `make paper` with novels, minilm, emotion and fashion_mnist; bench/paper/README.md has the commands that get them.
INPUTS ?= inputs

.PHONY: demo test lint types contracts docs-check docs dist bench paper sanitize clean

demo: $(VENV)/.runtime
	$(BIN)/moeify demo --out demo-out --overwrite

# Two processes of one thread each: tests are small, and one thread of them is as fast as two.
test: $(VENV)/.dev lint types contracts docs-check docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

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
	test ! -f docs/paper.md || $(BIN)/python -m bench.paper --out docs/paper --page docs/paper.md --check

# The site, in build/site; a warning is an error.
docs: $(VENV)/.dev
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/site

# The source distribution, and the wheel of what is in it, in dist; tests/e2e/test_wheel.py installs the same and runs it elsewhere.
dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -c "from setuptools.build_meta import build_sdist; build_sdist('dist')"
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w dist dist/*.tar.gz

bench: $(VENV)/.dev
	$(PIP) -e '.[bench]'
	for case in $(CASES); do $(BIN)/python -m bench.run $$case --json bench/results/$(DEVICE)/$$case.jsonl || exit 1; done

paper: $(VENV)/.dev
	$(BIN)/python -m bench.paper --all --inputs $(INPUTS) --out paper-out --page paper-out/paper.md

# The compiled kernels under AddressSanitizer and UBSan; needs g++. Whatever fails, or is interrupted, the plain library is built again.
sanitize: $(VENV)/.dev
	trap : INT; \
	export MOEIFY_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g"; \
	$(BIN)/python setup.py -q build_ext --inplace \
	&& ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		$(BIN)/python -m pytest -q --capture=sys tests/unit/kernels/test_cpu.py tests/unit/kernels/test_amx.py tests/unit/kernels/test_cpu_op.py \
		tests/unit/kernels/test_int8.py tests/unit/kernels/test_cpu_linear.py tests/unit/kernels/test_cpu_neurons.py tests/unit/kernels/test_cpu_train.py; \
	status=$$?; unset MOEIFY_CXXFLAGS; $(BIN)/python setup.py -q build_ext --inplace && exit $$status

# csrc is compiled by the installation.
$(VENV)/.runtime: pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[report]'
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-out paper-out build dist src/*.egg-info .mypy_cache .ruff_cache
