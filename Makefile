# make demo: the whole pipeline on a small GPT in a few minutes.  make test: lint, types, contracts, tests, docs.
# Both build .venv with pinned versions (constraints.txt). torch goes first, so that nothing else decides its version; for a CPU build
# where the registry serves CUDA ones, install torch into .venv from a CPU index before.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Modules are compiled when they are first imported: most of what is installed never is, and compiling it all takes most of a minute.
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# What `make bench` runs, and whose folder of bench/results it writes; local is ignored by git.
CASES  ?= split grouped exactness moe_ffn_cpu sparse_linear_cpu neuron_ffn_cpu generate_cpu generate_sparse_cpu enforcement compare
DEVICE ?= local
# Folder of `make paper` with novels, minilm, emotion and fashion_mnist; bench/paper/README.md has the commands that get them.
INPUTS ?= inputs

# What an installation is made from.
BUILT  := pyproject.toml constraints.txt setup.py $(wildcard csrc/*)

.PHONY: demo test lint types contracts docs-check docs dist bench paper sanitize sanitize-gpu clean

demo: $(VENV)/.runtime
	$(BIN)/moeify demo --out demo-out --overwrite

# The checks two at a time, for each has one thread; the longest first. Tests are small: two processes of one thread each are as fast as two threads.
test: $(VENV)/.dev
	$(MAKE) --no-print-directory -j 2 types docs docs-check contracts lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

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
	$(BIN)/python scripts/pictures.py --check
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

# The Triton kernels of experts under NVIDIA's compute-sanitizer; needs a GPU and CUDA's tools.
sanitize-gpu: $(VENV)/.dev
	for tool in memcheck racecheck; do \
		compute-sanitizer --tool $$tool --target-processes all --error-exitcode 1 \
		$(BIN)/python -m pytest -q -x tests/unit/kernels/device_ffn.py -k "as_accurate" || exit 1; \
	done

# csrc is compiled by the installation, so of .runtime and .dev each installs all it needs at once.
$(VENV)/.runtime: $(BUILT)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[report]'
	touch $@

$(VENV)/.dev: $(BUILT)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[dev]'
	touch $(VENV)/.runtime $@

clean:
	rm -rf $(VENV) demo-out paper-out build dist src/*.egg-info .mypy_cache .ruff_cache
