# `make` lists the targets. Everything runs in .venv, which `make venv` builds from constraints.txt.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip
STAMP := $(VENV)/.installed
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv browser test lint demo bench peers models wheel clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 12

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

browser: ## Debian's chromium, which the tests of the pages use; without it they are skipped
	@if command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		echo "chromium, for the tests of the pages (a minute)"; \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null \
		|| echo "chromium could not be installed: the tests of the pages will be skipped"; \
	else echo "no chromium here, and only root can install it by apt-get: the tests of the pages will be skipped"; fi

.PHONY: quantization
quantization: $(VENV)/.quantization ## torchao and gguf, which the tests of quantized models use

$(VENV)/.quantization: $(STAMP)
	@$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[quantization]'
	@touch $@

$(VENV)/.docs: $(STAMP)
	@$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[docs]'
	@touch $@

.PHONY: docs
docs: $(VENV)/.docs ## the documentation site in site/; a warning or a link to nothing is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	$(PY) docs/site/check_site.py site

test: venv browser quantization ## every test, slow ones too, on all cores; ARGS="-k name" goes to pytest
	$(PY) -m pytest -n auto --maxprocesses 8 --dist loadgroup $(ARGS)

.PHONY: matrix
matrix: venv ## the fast tests on Python 3.11 to 3.13 and torch 2.11 to 2.13, where to be had; ARGS="--torch 2.12.1 -k lora"
	$(PY) -m tests.version_matrix $(ARGS)

lint: venv ## ruff check, ruff format, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

demo: venv ## digits by FluxPipeline and clips by WanPipeline, without and with the cache; ARGS="--threshold 0.3"
	$(PY) examples/digits/demo.py $(ARGS)
	$(PY) examples/clips/demo.py $(ARGS)

bench: venv ## ours beside every peer in whole pipelines, on a CPU; ARGS="--quick", "--work qwen --rounds 5", "--write-docs", "--help"
	-$(PIP) install --quiet -c constraints.txt cache-dit
	$(PY) -m benchmarks.run $(ARGS)

.PHONY: quality
quality: venv ## what a cache costs in quality on both trained models, into docs/quality.md; ARGS="--quick", "--help"
	-$(PIP) install --quiet -c constraints.txt cache-dit
	$(PY) -m benchmarks.quality $(or $(ARGS),--json docs/quality.json --write docs/quality.md)

# In an existing environment with torch 2.11 or later and diffusers, without .venv: make bench-gpu PY=python
.PHONY: bench-gpu
bench-gpu: ## checks and measurements on a GPU, in 11 minutes; PY=python, ARGS="--minutes 5", "--device cpu --tiny"
	$(or $(shell command -v $(PY)),$(PYTHON)) -m benchmarks.gpu $(ARGS)

peers: venv ## records anew what cache-dit decides on the cases of tests/peers, and its public names
	$(PIP) install --quiet -c constraints.txt cache-dit
	$(PY) -m tests.peers.record
	$(PY) -m tests.peers.names

models: venv ## writes docs/models.md and the table of doctor anew: what becomes of every transformer of diffusers
	$(PY) -m tests.zoo.table

wheel: venv ## sdist, wheel from the sdist, then the wheel tried outside the tree
	rm -rf build dist
	$(PY) -m build --no-isolation .
	$(PY) .ci/check_wheel.py dist/*.whl

.PHONY: release-check
release-check: wheel ## what a release needs: sdist, wheel, public names, version; ARGS=--final for the release itself
	$(PY) -m twine check --strict dist/*
	$(VENV)/bin/check-wheel-contents dist/*.whl
	$(PY) -m tests.public_api
	$(PY) .ci/check_release.py dist/*.whl $(ARGS)

clean: ## removes everything that these targets made
	rm -rf $(VENV) .matrix build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
