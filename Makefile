# `make demo` and `make test` need nothing but Python 3.11 or later and make: a virtual environment is built on the way.

VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2
VENV1 ?= .venv-arviz1
PYTHON312 ?= python3.12

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
BASE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
BENCH := $(VENV)/.installed-bench
QUALITY := $(VENV)/.installed-quality
ARVIZ1 := $(VENV1)/.installed
SOURCES := pyro_vae examples tests docs conftest.py
# A process that has run its share of the tests takes some of another's; neighbours stay together and share fixtures.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: demo test integration package slow bench cuda quality scale applications programs arviz1 tests pytest lint types format docs install clean help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  Variables: VENV=$(VENV) (where to install), PYTHON=$(PYTHON) (3.11 or later), JOBS=$(JOBS) (test processes)"

demo: $(BASE)  ## run two of the examples; tables, pictures and ArviZ files go to results/
	OMP_NUM_THREADS=1 $(BIN)/python examples/mixture.py --out results/mixture
	OMP_NUM_THREADS=1 $(BIN)/python examples/digits.py --out results/digits

test: lint types pytest  ## lint, types, tests with doctests

pytest: $(DEV)  ## the tests and doctests alone, without the slow and the integration tests
	$(PYTEST)

integration: docs $(DEV)  ## the documentation, warnings as errors; its code, the examples, and the real compiler
	$(PYTEST) -m 'integration and not slow'

tests: $(DEV)  ## the tests of `pytest` and of `integration` in one run, which takes less time
	$(PYTEST) -m 'not slow'

install: $(DEV)  ## the environment alone, with all tools

package: $(DEV)  ## a wheel and a source archive in dist/, checked
	rm -rf build dist
	$(BIN)/python -m build --no-isolation --outdir dist . > /dev/null
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tests/check_wheel.py dist

slow: $(DEV)  ## the heavy statistical tests
	$(PYTEST) -m slow

bench: $(BENCH)  ## time and memory compared with Pyro, PyTorch and NumPyro, on an idle machine; SHORT=1 for 3 minutes
	$(BIN)/python tests/benchmarks $(if $(SHORT),--short)

cuda: $(DEV)  ## on a machine with a GPU: its tests, and the time of a step compared with plain Pyro and NumPyro
	$(BIN)/python -m pytest tests/test_cuda.py
	$(BIN)/python tests/cuda_benchmark.py

quality: $(QUALITY)  ## seconds to a held-out target, compared with Pyro, NumPyro and pythae, in results/quality; MNIST=folder of its files
	$(BIN)/python tests/quality $(if $(MNIST),--folder $(MNIST))

scale: $(DEV)  ## throughput of two ranks compared with one, in results/scaling.json; MNIST=folder of its files
	$(BIN)/python tests/scaling $(if $(MNIST),--folder $(MNIST))

applications: $(DEV)  ## run each application with three seeds, for about an hour, and write its page; MNIST=folder of its files
	$(BIN)/python docs/applications.py --jobs $(JOBS) $(if $(MNIST),--folder $(MNIST))

programs: $(DEV)  ## the table of docs/programs.md: what the package does with many Pyro programs
	OMP_NUM_THREADS=1 $(BIN)/python tests/programs $(JOBS)

arviz1: $(DEV) $(ARVIZ1)  ## read and draw the package's files with ArviZ 1, in an environment of its own
	PYRO_VAE_ARVIZ1_PYTHON=$(abspath $(VENV1))/bin/python OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest tests/inference_data/test_arviz.py -k arviz_1

lint: $(DEV)  ## rules, format, and the layers of the package
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/lint-imports --no-logo

types: $(DEV)  ## mypy
	$(BIN)/mypy

format: $(DEV)  ## let ruff mend what it can
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

docs: $(DEV)  ## the documentation, in docs/_build/html; SHORT=1 for notebooks with few steps, in less time
	$(if $(SHORT),PYRO_VAE_DOCS=short )OMP_NUM_THREADS=1 $(BIN)/sphinx-build -W --keep-going -q -j $(JOBS) -b html docs docs/_build/html
	$(BIN)/python docs/check_links.py docs/_build/html
	$(BIN)/python docs/check_pages.py docs/_build/html

clean:  ## remove caches and the built documentation; results/ and the environment stay
	rm -rf docs/_build docs/examples docs/sg_execution_times.rst build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		.import_linter_cache
	find pyro_vae tests examples docs -name __pycache__ -type d -prune -exec rm -rf {} +

# Installation: a light one for the demo, and one with the tools. Each is renewed when what it is made from changes.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pyro_vae needs Python 3.11 or later, and PYTHON=$(PYTHON) is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(BASE): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[flows,frames,sweep,optuna,examples,test,docs]'
	@touch $(BASE) $@

$(BENCH): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[bench]'
	@touch $(BASE) $@

$(QUALITY): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[quality]'
	@touch $(BASE) $@

# ArviZ 1 needs another Python than the package may have, and no torch.

$(ARVIZ1): constraints-arviz1.txt
	@$(PYTHON312) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "ArviZ 1 needs Python 3.12 or later, and PYTHON312=$(PYTHON312) is " + sys.version.split()[0])'
	$(PYTHON312) -m venv $(VENV1)
	$(VENV1)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-arviz1.txt \
		'arviz>=1' matplotlib h5netcdf h5py
	$(VENV1)/bin/python -c 'import arviz; assert int(arviz.__version__.split(".")[0]) >= 1'
	@touch $@
