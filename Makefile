# Everything needed is set up by the target that needs it. A stamp file stands for each finished
# installation, and _docs/index.html for the site, so that doing a thing twice does no work twice.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test lint test-latest docs dist prepare outputs clean

PACKAGING := settings.ini setup.py pyproject.toml
NOTEBOOKS := $(shell find nbs -name '*.ipynb' -not -path '*/.*' 2>/dev/null)
LIBRARY   := $(shell find dr_transfer -name '*.py' 2>/dev/null)
# what ruff reads; the library is made from nbs
CHECKED   := nbs tests tools setup.py
PAGES     := $(shell find nbs -type f -not -path '*/.*' 2>/dev/null)

# Two workers, and as many threads for each as there are cores to share: torch in each worker
# would otherwise take all the cores, and the workers would wait for one another.
WORKERS ?= 2
CORES   := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
THREADS := $(shell n=$$(( $(CORES) / $(WORKERS) )); echo $$(( n > 0 ? n : 1 )))
# A file is the work of one worker, and tests/conftest.py puts the longest files first.
SHARED  := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# The tests need no model hub, and must not wait for one.
QUIET   := OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=$(THREADS) HF_HUB_OFFLINE=1

BIN := .venv/bin

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

demo: .venv/.installed ## Install, then run the demonstration (dr_transfer demo)
	$(BIN)/dr_transfer demo

test: .venv/.installed-dev ## Format, notebooks clean, library in sync, nbdev_test, pytest, hostile inputs, docs and their links
	@$(MAKE) --no-print-directory lint
	$(BIN)/python tools/check_notebooks.py
	$(QUIET) $(BIN)/nbdev_test --n_workers $(WORKERS) --do_print
	$(QUIET) $(BIN)/python -m pytest $(SHARED) $(PYTEST_ARGS)
	$(QUIET) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests/hostile
	@$(MAKE) --no-print-directory docs
	$(BIN)/python -m pytest tests/test_docs.py

lint: .venv/.installed-dev ## ruff over notebooks, tests and tools; how dense the code is; mypy over core, cli and metrics
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/python tools/code_density.py --most 7
	$(BIN)/mypy

test-latest: .venv-latest/.installed ## pytest with the newest fastai and fastcore, without nbdev
	$(QUIET) .venv-latest/bin/python -m pytest $(SHARED) $(PYTEST_ARGS)

docs: _docs/index.html ## Build the site into _docs/ and check its links
	$(BIN)/python tools/check_links.py _docs

dist: .venv-build/.installed ## Build wheel and sdist into dist/, check them, and run the wheel in an empty environment
	rm -rf build dist .venv-wheel
	.venv-build/bin/python -m build
	.venv-build/bin/python -m twine check --strict dist/*
	@$(MAKE) --no-print-directory .venv-wheel/bin/python
	$(call install,.venv-wheel,dist/*.whl)
	env -u PYTHONPATH .venv-wheel/bin/dr_transfer --help >/dev/null

prepare: .make/prepare ## Format, clean the notebooks, export the library, rebuild README.md

outputs: .make/prepare ## Run every notebook, store its outputs, then prepare (NB=... for one)
	$(BIN)/python tools/store_outputs.py $(NB)
	@$(MAKE) --no-print-directory prepare

clean: ## Remove what was built; the environments stay
	rm -rf _docs _proc .make build dist *.egg-info .pytest_cache

# ---------------------------------------------------------------- what is built

_docs/index.html: $(PAGES) $(LIBRARY) _quarto.yml settings.ini tools/build_docs.py tools/check_links.py | .venv/.installed-dev
	$(QUIET) $(BIN)/python tools/build_docs.py --workers $(WORKERS)

# The export rewrites modules that did not change as well, so the stamp comes last.
.make/prepare: $(NOTEBOOKS) settings.ini tools/build_index.py tools/build_readme.py tools/write_parameters.py | .venv/.installed-dev
	$(BIN)/ruff format $(CHECKED)
	$(BIN)/python tools/write_parameters.py
	$(BIN)/python tools/build_index.py
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python tools/build_readme.py
	@mkdir -p .make && touch $@

# ---------------------------------------------------------------- environments

# uv installs in seconds what takes pip minutes; where it cannot be had, or fails, pip does the work. Like
# pip it compiles what it installs: else each of the many processes of the tests does, where none may write.
# $(1): the environment, $(2): what to install
install = $(1)/bin/uv pip install --compile-bytecode --python $(1)/bin/python $(2) || $(1)/bin/python -m pip install $(2)

%/bin/python:
	@for python in python3.11 python3 python; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi; python=; done; \
	if [ -z "$$python" ]; then echo 'Python 3.11 or newer is needed, and neither python3.11 nor python3 is one.' >&2; exit 1; fi; \
	if ! $$python -m venv $*; then rm -rf $*; \
	  echo "$$python cannot make an environment: on Debian and Ubuntu, install python3-venv." >&2; exit 1; fi
	$*/bin/python -m pip install --quiet uv || echo 'uv cannot be had: pip takes its place.'

# A plain installation never undoes that of the developers: where that one is, it is the one renewed.
.venv/.installed: $(PACKAGING) | .venv/bin/python
	if [ -e .venv/.installed-dev ]; then $(MAKE) .venv/.installed-dev; \
	else $(call install,.venv,-e .); fi
	@touch $@

.venv/.installed-dev: $(PACKAGING) | .venv/bin/python
	$(call install,.venv,-e '.[dev]')
	@touch $@ .venv/.installed

.venv-latest/.installed: $(PACKAGING) | .venv-latest/bin/python
	$(call install,.venv-latest,-e ".[all]" fastai fastcore pytest pytest-xdist hypothesis)
	$(@D)/bin/python tools/check_latest.py
	@touch $@

.venv-build/.installed: | .venv-build/bin/python
	$(call install,.venv-build,build twine)
	@touch $@
