# `make` lists the targets. Everything runs in .venv, which `make venv` builds from constraints.txt.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip
STAMP := $(VENV)/.installed
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv test lint demo bench peers models wheel clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  \1\t/' | expand -t 12

venv: $(STAMP) ## .venv with the pinned dependencies and this package, editable

$(STAMP): setup.py constraints.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: '$(PYTHON)' not found; name an interpreter: make venv PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: cachedit_fx needs Python 3.11 or later, $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make venv PYTHON=python3.11" >&2; exit 1; }
	@echo "[1/4] $(VENV) from $$($(PYTHON) -V)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/4] setuptools, wheel"
	@$(PIP) install --quiet -c constraints.txt setuptools wheel
	@echo "[3/4] torch (large: a minute or more)"
	@$(PIP) install --quiet -c constraints.txt torch==2.13.0
	@echo "[4/4] cachedit_fx[test,dev], editable"
	@$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[test,dev]'
	@touch $@
	@echo "done: $(VENV)/bin/python"

test: venv ## every test, slow ones too, on all cores; ARGS="-k name" goes to pytest
	$(PY) -m pytest -n auto --maxprocesses 8 $(ARGS)

lint: venv ## ruff check, ruff format, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

demo: venv ## draws the ten digits with the real FluxPipeline, without and with the cache
	$(PY) examples/digits/demo.py $(ARGS)

bench: venv ## the measurements
	$(PY) benchmarks/run.py $(ARGS)

peers: venv ## records anew what cache-dit decides on the cases of tests/peers
	$(PIP) install --quiet -c constraints.txt cache-dit
	$(PY) -m tests.peers.record

models: venv ## writes docs/models.md anew: what becomes of every transformer of diffusers
	$(PY) -m tests.zoo.table

wheel: venv ## sdist, wheel from the sdist, then the wheel tried outside the tree
	rm -rf build dist
	$(PY) -m build --no-isolation .
	$(PY) .ci/check_wheel.py dist/*.whl

clean: ## removes everything that these targets made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
