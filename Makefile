# LLM Atlas. `make` lists the targets. Needs Python 3.11 or newer, git and make; everything else goes into .venv.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
PORT ?= 8000
# Extra arguments for pip, such as an index with smaller builds of torch: make book PIP_ARGS="--extra-index-url URL"
PIP_ARGS ?=
# The notebooks of `make chapters`, or the numbers of `make course`. REFRESH=1 replaces the stored outputs of tagged
# cells too.
CHAPTERS ?=
REFRESH ?=

BIN := .venv/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check install $(PIP_ARGS)
PIP_VERSION := 26.3
TORCH := $(shell grep -m 1 '^torch==' requirements.txt)
# Everything that starts a kernel, a browser or a build runs under a limit, in seconds.
LIMIT := $(PY) tools/limit.py

# Not the user's own packages, profiles or kernels.
unexport PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE := 1
export IPYTHONDIR := $(CURDIR)/.venv/ipython
export JUPYTER_PLATFORM_DIRS := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1

NOT_SITE := --ignore=tests/test_site.py --ignore=tests/browser
TYPES := --jaxtyping-packages=llm_atlas,beartype.beartype
# A thread a worker: OpenMP's threads wait for each other by spinning, and two pairs of them on two cores crawl.
WORKERS := -n 2 --dist loadfile
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
NBVAL := --nbval --nbval-current-env --nbval-sanitize-with tests/nbval-sanitize.cfg --nbval-cell-timeout 180
# Another CPU: no vector kernels in torch, an older instruction set in oneDNN and MKL, one thread. A printed number
# that depends on the order of a sum differs here.
OTHER_CPU := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2 \
	$(ONE_THREAD)

.PHONY: help
help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo '  make chapters CHAPTERS=chapters/01-core-transformer.ipynb   only this one'
	@echo '  make chapters REFRESH=1     also new outputs for cells tagged nbval-ignore-output (timings, trained losses),'
	@echo '                              which otherwise stay while the code above them is unchanged'
	@echo '  make course CHAPTERS="1 2"  only these chapters'
	@echo '  make serve PORT=8001        on another port'
	@echo '  make book PYTHON=python3.12 with another Python (for a new .venv)'

# ---------------------------------------------------------------------------------------------- set-up

.venv/.stamp-python:
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
	  echo "error: $(PYTHON) was not found; install Python 3.11 or newer, or run: make book PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: LLM Atlas needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; run: make book PYTHON=/path/to/python")'
	"$(PYTHON)" -m venv .venv
	$(PIP) --upgrade pip==$(PIP_VERSION)
	@touch $@

# torch first and alone, so that nothing else chooses its build.
.venv/.stamp-book: .venv/.stamp-python requirements.txt
	$(PIP) "$(TORCH)"
	$(PIP) -r requirements.txt
	@touch $@

.venv/.stamp-course: .venv/.stamp-book requirements-course.txt
	$(PIP) -r requirements-course.txt
	@touch $@

.venv/.stamp-test: .venv/.stamp-book requirements-test.txt requirements-course.txt requirements-triton.txt
	$(PIP) -r requirements-test.txt
	@$(PY) -c 'import triton' 2>/dev/null || $(PIP) -r requirements-triton.txt
	@touch $@

# The package itself, in place: again when its entry points may have changed.
.venv/.stamp-package: .venv/.stamp-book pyproject.toml
	$(PIP) --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.PHONY: setup setup-test
setup: .venv/.stamp-book .venv/.stamp-package
setup-test: setup .venv/.stamp-test

# ------------------------------------------------------------------------------------------ the book

.PHONY: assets
assets: setup  ## fetch the real models and data (checked, cached outside the tree)
	@$(BIN)/llm-atlas assets

.PHONY: site
site: setup
	@$(PY) tools/build_site.py

.PHONY: book
book: assets  ## set up, fetch, and build the site into _build/html
	@$(PY) tools/build_site.py

.PHONY: serve
serve: book  ## serve the built site on this machine
	@echo "http://127.0.0.1:$(PORT)/ (Ctrl-C ends it)"
	@$(PY) -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

.PHONY: chapters
chapters: assets  ## execute the notebooks in place, in one normal form
	@$(PY) -c 'import matplotlib.font_manager'
	@$(ONE_THREAD) $(LIMIT) 3600 $(PY) tools/execute_chapters.py $(if $(REFRESH),--refresh) $(CHAPTERS)

.PHONY: course
course: setup .venv/.stamp-course  ## chapters as nbgrader assignments, in _build/course
	@$(LIMIT) 600 $(BIN)/llm-atlas course $(CHAPTERS)

# ------------------------------------------------------------------------------------------ the tests

.PHONY: test
test: lint test-unit test-chapters test-site  ## everything: lint, unit tests, notebooks twice, site, browser

.PHONY: lint
lint: setup-test  ## ruff, notebooks included
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: fmt
fmt: setup-test  ## format and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: test-unit
test-unit: setup-test assets
	$(LIMIT) 600 $(PY) -m pytest tests $(NOT_SITE) -m untyped
	$(ONE_THREAD) $(LIMIT) 1200 $(PY) -m pytest tests $(NOT_SITE) -m "not untyped" $(WORKERS) $(TYPES)

.PHONY: test-chapters
test-chapters: setup-test assets
	@$(PY) -c 'import matplotlib.font_manager'  # else the first figure says on stderr that it builds the font cache
	@if ls chapters/*.ipynb >/dev/null 2>&1; then set -ex; \
	  $(ONE_THREAD) $(LIMIT) 1800 $(PY) -m pytest $(NBVAL) $(WORKERS) chapters; \
	  $(OTHER_CPU) $(LIMIT) 1800 $(PY) -m pytest $(NBVAL) $(WORKERS) chapters; \
	else echo 'There is no notebook in chapters/ yet.'; fi

.PHONY: test-site
test-site: setup-test site
	LLM_ATLAS_REQUIRE_SITE=1 $(LIMIT) 1500 $(PY) -m pytest tests/test_site.py tests/browser -n 2

.PHONY: bench
bench: setup-test assets  ## speed against the peer, in one run
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(LIMIT) 3600 $(PY) "$$script" || exit 1; done

.PHONY: clean
clean:  ## remove what was built (.venv and the fetched models stay)
	rm -rf _build dist .pytest_cache .ruff_cache .hypothesis
	find src tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
