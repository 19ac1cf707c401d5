# Two commands for a fresh clone: `make quickstart` and `make test`. Both need only Python >= 3.11; the rest goes to .venv.
#
#   PYTHON=python3.12    the interpreter that .venv is made with
#   VENV=path            another place for the environment
#   CONSTRAINTS=         the newest versions instead of those in constraints.txt
#   JOBS=2               test processes; one a core where not given, at most 8
#   PYTEST_ARGS='-k cka' more arguments for pytest

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
OUT ?= runs/quickstart
JOBS ?= auto
PYTEST_ARGS ?=

BIN := $(VENV)/bin
# With --no-compile the install takes half as long; byte code is made for the modules that are imported, when they first are. Where the
# shell forbids that, every start of torch and its company would take ten seconds more.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip install --no-compile $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable

.PHONY: quickstart test lint types docs dist clean

quickstart: $(VENV)/installed
	$(BIN)/layerprobe quickstart --out $(OUT)

# One thread a process: two test processes with two torch threads each run ten times slower on two cores.
test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --maxprocesses 8 $(PYTEST_ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

docs: $(VENV)/installed-dev
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs docs/_build/html

dist: $(VENV)/installed-dev
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf .venv build dist docs/_build *.egg-info .mypy_cache .pytest_cache .ruff_cache

# The environment is made once, and again when the dependencies change. The install is editable: sources need no rebuild.
$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/pyvenv.cfg pyproject.toml $(CONSTRAINTS)
	$(INSTALL) .
	touch $@

$(VENV)/installed-test: $(VENV)/pyvenv.cfg pyproject.toml $(CONSTRAINTS)
	$(INSTALL) '.[test]'
	touch $(VENV)/installed $@

$(VENV)/installed-dev: $(VENV)/pyvenv.cfg pyproject.toml $(CONSTRAINTS)
	$(INSTALL) '.[dev]'
	touch $(VENV)/installed $(VENV)/installed-test $@

# A half-made environment must not look finished.
.DELETE_ON_ERROR:
