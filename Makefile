# `make demo` and `make test` work from a bare machine with Python 3.11+ and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= dev
# Versions that the tests pass with. CONSTRAINTS= (empty) takes the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints/python$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt
PINS := $(addprefix -c ,$(wildcard $(CONSTRAINTS)))
# Work in progress: the mathematics, the contracts, the architecture. Everything else: make test.
QUICK := layers docs types losses golden_losses advantages head objectives methods reference update packing judge configs examples \
	mutants

LINTS := style types dependencies shell mutants configs

.PHONY: demo test quick quick-tests gpu-programs mutants lint $(LINTS:%=lint-%) check format env constraints clean

$(VENV)/.demo: pyproject.toml $(wildcard $(CONSTRAINTS))
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(PINS) -e .
	@touch $@

$(VENV)/.$(EXTRAS): $(VENV)/.demo
	$(BIN)/pip install --quiet $(PINS) -e ".[$(EXTRAS)]"
	@touch $@

env: $(VENV)/.$(EXTRAS)

demo: $(VENV)/.demo
	$(BIN)/tsopsd demo

test: env
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations 25

# Two minutes on two cores with warm caches, for work in progress.
quick: lint quick-tests

quick-tests: env
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow" $(QUICK:%=tests/test_%.py)

# Programs for GPUs, compiled without one: several GB of CUDA libraries, in an environment of their own.
gpu-programs:
	$(MAKE) env EXTRAS=dev,cuda VENV=.venv-cuda
	.venv-cuda/bin/python -m pytest -n 0 --durations 5 tests/test_gpu_programs.py tests/test_decoding_bytes.py tests/test_update_bytes.py

mutants: env
	$(BIN)/python tests/mutants.py --jobs $(shell nproc) $(MUTANTS)

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What CI runs besides the tests: style, types, dependencies, configurations; all of them, whatever the first ones find.
lint: env
	@$(MAKE) --no-print-directory --keep-going $(LINTS:%=lint-%)

lint-style:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-types:
	$(BIN)/pyright --pythonpath $(BIN)/python

lint-dependencies:
	$(BIN)/deptry tsopsd_jax

lint-shell:
	$(BIN)/shellcheck tpu/*.sh tpu/gke/*.sh scripts/slurm/*.sh

lint-mutants:
	$(BIN)/python tests/mutants.py --check

lint-configs:
	$(BIN)/tsopsd check --syntax-only configs/*.yaml configs/paper/*.yaml

check: lint test mutants

# Write the versions of this environment (make it with CONSTRAINTS= first) to the file that `make env` installs from.
constraints: env
	(echo "# The versions that the tests pass with: make env installs them, make constraints writes them anew."; \
	$(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//') > $(CONSTRAINTS)

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache
