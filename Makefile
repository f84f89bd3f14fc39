# Every target first sets up .venv (Python 3.10 to 3.13). `make format` formats the code.
# `make bench-methods` fills benchmarks/methods.csv and resumes an interrupted run; ARGS="--full --dry-run" passes options
# to the script.
# PYTHON=python3.11 selects an interpreter; PIP_ARGS="..." is passed to pip (another index for torch, say).

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
NO_PYTHON := No Python 3.10 to 3.13 was found: install one, or name one with PYTHON=...
PIP_ARGS ?=
# the torch of this environment; the package itself takes any from 2.1 on, and PyPI's newest for Linux brings all of CUDA
TORCH ?= torch==2.13.*
# and its libraries; `make matrix` runs the oldest and the newest ones
LIBRARIES ?= transformers==4.57.* diffusers==0.36.*
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LINK := $(VENV)/typing/forget_concept
OUT ?= demo
ARGS ?=
# two processes with one thread each: the tests' small models do not benefit from more threads
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: demo test test-long lint format generated bench-methods matrix

demo: $(READY)
	$(BIN)/python -m forget_concept.core.cli demo --out $(OUT)

test: lint
	$(PYTEST) -m "not long"

test-long: lint
	$(PYTEST)

bench-methods: $(READY)
	$(BIN)/python benchmarks/methods.py --work build/bench $(ARGS)

# the quick tests with the oldest and the newest libraries; environments of its own, written to docs/versions.md
matrix:
	@test -n "$(PYTHON)" || { echo "$(NO_PYTHON)" >&2; exit 1; }
	$(PYTHON) tests/matrix.py --workers $(WORKERS) $(if $(PIP_ARGS),--pip-args="$(PIP_ARGS)") $(ARGS)

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	MYPYPATH=$(VENV)/typing $(BIN)/python -m mypy -p forget_concept
	$(BIN)/python -m forget_concept.nodes.generate --check

# locales and help pages, generated from nodes and settings
generated: $(READY)
	$(BIN)/python -m forget_concept.nodes.generate
	$(BIN)/python docs/make_api.py

format: $(READY)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# the stamp file records a complete setup, so that later runs start immediately
$(READY): pyproject.toml Makefile
	@test -n "$(PYTHON)" || { echo "$(NO_PYTHON)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) '$(TORCH)' $(foreach item,$(LIBRARIES),'$(item)') -e '.[cli,dev]'
	@# the original LDM UNet, for tests; --no-deps, because it pins versions that are years old
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) --no-deps stable-diffusion-sdkit==2.1.5
	@# mypy finds the package through this link, whatever the repository's folder is called
	@mkdir -p $(dir $(LINK)) && ln -sfn ../.. $(LINK)
	@touch $(READY)
