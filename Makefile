# make demo   train a classifier with torch.nn norms and with fastnorm, side by side
# make test   every test that needs no GPU
# make help   the other targets
#
# Everything runs in $(VENV), made from requirements-dev.txt on first use. VENV=DIR uses another
# folder, PYTHON=NAME another interpreter (3.10 or later).

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.fastnorm-setup
CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' \
	'tests/simt/*.h' 'tests/simt/*.cpp' 'tests/simt/*.cuh')
# A file's tests stay in one process, so what they compile is compiled once.
PYTEST_ARGS ?= -q -n 2 --dist loadfile

.PHONY: help setup test lint format demo bench gpu clean-cache
.DEFAULT_GOAL := help

help:
	@echo "make demo         train on handwritten digits with torch.nn norms and with fastnorm"
	@echo "make test         every test that needs no GPU (PYTEST_ARGS='-k layer' for some)"
	@echo "make bench        the benchmark table on this machine's CPU (BENCH_ARGS=--quick or --sweep)"
	@echo "make gpu          build, test and benchmark on this machine's CUDA GPU, with PYTHON's torch"
	@echo "make lint         ruff, mypy and clang-format, changing nothing"
	@echo "make format       let ruff and clang-format rewrite the files"
	@echo "make clean-cache  remove the compiled kernels; the next use compiles them again"

setup: $(STAMP)

# The stamp is newer than the requirements only after an install that went through to its end.
$(STAMP): requirements-dev.txt
	@echo "== setting up $(VENV) (once; torch is a large download)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "fastnorm needs Python 3.10 or later; say PYTHON=/path/to/python3"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

test: setup
	@echo "== compiling the CPU kernels, unless they are compiled already"
	@$(PY) -m fastnorm build
	@echo "== tests"
	@$(PY) -m pytest tests $(PYTEST_ARGS)

lint: setup
	@echo "== ruff"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@echo "== mypy"
	@$(PY) -m mypy
	@echo "== clang-format"
	@$(if $(CXX_FILES),$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES),true)

format: setup
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .
	@$(if $(CXX_FILES),$(VENV)/bin/clang-format -i $(CXX_FILES),true)

demo: setup
	@PYTHONPATH=. $(PY) examples/digits.py

bench: setup
	@$(PY) -m benchmarks.run --output results $(BENCH_ARGS)

# No set-up and no network: the machine's own torch (2.11 or later) is what is measured.
gpu:
	@$(PYTHON) -m benchmarks.gpu $(GPU_ARGS)

clean-cache: setup
	@$(PY) -m fastnorm build --clean
