# `make demo` and `make test` work from a bare machine with Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= dev

.PHONY: demo test mutants lint check format env clean

$(VENV)/.demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e .
	@touch $@

$(VENV)/.$(EXTRAS): $(VENV)/.demo
	$(BIN)/pip install --quiet -e ".[$(EXTRAS)]"
	@touch $@

env: $(VENV)/.$(EXTRAS)

demo: $(VENV)/.demo
	$(BIN)/tsopsd demo

test: env
	$(BIN)/python -m pytest -n 2 --dist loadfile

mutants: env
	$(BIN)/python tests/mutants.py --jobs 2

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What CI runs besides the tests: style, types, configurations.
lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/shellcheck tpu/*.sh tpu/gke/*.sh
	$(BIN)/tsopsd check --syntax-only configs/*.yaml configs/paper/*.yaml

check: lint test mutants

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache
