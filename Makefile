# `make quickstart` and `make test` do everything from a fresh clone; a second call repeats nothing that is
# still up to date. PYTHON is only used to create the environment.
PYTHON ?= python3
DATA ?=
# Files go to the workers whole, as their tests share fixtures and compiled kernels.
PYTEST_ARGS ?= -n 2 --dist loadfile -m "not slow"

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip -qq --disable-pip-version-check --no-input

.PHONY: help setup quickstart test test-slow lint clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart              train, evaluate and run a small model on drawn pictures (2-3 minutes)"
	@echo "make quickstart DATA=folder  the same on your pictures (folder/train/<class>/, folder/val/<class>/)"
	@echo "make test                    all tests but the slow ones, in two processes"
	@echo "make test-slow               the slow ones: whole networks, every layer of the gates, real pictures"
	@echo "make lint                    ruff"
	@echo "make clean                   remove the environment and build products"

# What is installed depends on these files alone, so they are all the stamps look at. A failed or
# interrupted install leaves no stamp and is taken up again.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mbv2 needs Python 3.10 or newer: make PYTHON=python3.11")'
	@echo "creating $(VENV)" >&2
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# nvidia-dali has wheels for Linux only; without it the torch loader is used.
EXTRAS := test,lint,tensorboard,build
ifeq ($(shell uname -s),Linux)
EXTRAS := $(EXTRAS),dali
endif

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt setup.py
	@echo "installing pinned packages into $(VENV) (minutes the first time)" >&2
	@$(PIP) install -c constraints.txt "setuptools>=77" wheel
	@MBV2_BUILD=0 $(PIP) install -c constraints.txt --no-build-isolation -e ".[$(EXTRAS)]"
	@touch $@

# Without a C++ compiler or nvcc this says so in one line and everything else works.
$(VENV)/.built: $(VENV)/.installed $(wildcard csrc/*.* csrc/*/*.*)
	@echo "compiling csrc" >&2
	@rm -f mbv2/_C.* mbv2/_cuda.*
	@$(PY) -W ignore setup.py -q build_ext --inplace --force
	@touch $@

setup: $(VENV)/.built

quickstart: $(VENV)/.built
	@$(PY) -m mbv2.quickstart $(if $(DATA),--data_url "$(DATA)")

test: $(VENV)/.built
	@$(PY) -m pytest $(PYTEST_ARGS)

test-slow: $(VENV)/.built
	@$(PY) -m pytest -n 2 -m slow

lint: $(VENV)/.installed
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check

clean:
	rm -rf $(VENV) build dist *.egg-info mbv2/_C.* mbv2/_cuda.*
