# Everything runs in its own virtual environment: none has to be active.
PYTHON ?= python3
VENV ?= .venv
OUT ?= out/demo
WORKERS ?= 2
TORCH ?=

BIN := $(VENV)/bin
# Next to no operator of a test's small models is met twice, and what torch keeps of the shapes of each takes half of a capture.
PYTEST = env OMP_NUM_THREADS=1 TORCH_FAKE_TENSOR_DISPATCH_CACHE=0 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Those that run a quantized product, fxq's kernels, another library's integers, or machine code.
DEPEND_ON_CPU = -m "not slow and not sweep and not gpu and not any_cpu"
STAMP := $(VENV)/.fxq-installed
DEMO_STAMP := $(VENV)/.fxq-demo-installed
DOCS_STAMP := $(VENV)/.fxq-docs-installed
RUNTIMES := $(VENV)/runtimes
# Another torch brings the Triton that fits it, or none, and may want another setuptools.
OTHER_TORCH = $(if $(TORCH),-e 's/^torch==.*/torch==$(TORCH)/' -e '/^triton==/d' -e 's/^setuptools==.*/setuptools>=77/',-n p)
# A tool started from here must not pick up another environment or another copy of the package; and processes of tests start
# in two thirds of the time where the package's own modules are kept compiled.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-fast test-torch test-avx2 test-avx2-all check lint browser docs dist release-check format clean

help: ## print every target
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## create .venv and install the pinned requirements and fxq

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: '$(PYTHON)' not found; install Python 3.11 or newer, or run: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"error: fxq needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}; run: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

# One resolution installs everything, so that torch's own dependencies meet the pins. Compiled is what gets imported,
# when it is.
$(STAMP): requirements.txt pyproject.toml | $(BIN)/python
	@echo "installing the pinned requirements into $(VENV); the first time this takes a minute or more"
	@sed $(OTHER_TORCH) requirements.txt > $(VENV)/requirements.txt
	@$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -r $(VENV)/requirements.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# The pins hold here too, without the tools of developers; where those are installed they are kept up to date.
$(DEMO_STAMP): requirements.txt pyproject.toml | $(BIN)/python
	@if [ -e $(STAMP) ]; then $(MAKE) --no-print-directory install; else \
	echo "installing fxq and what it needs into $(VENV); the first time this takes a minute" && \
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c requirements.txt setuptools wheel && \
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c requirements.txt --no-build-isolation -e .; fi
	@touch $@

demo: $(DEMO_STAMP) ## quantize the shipped video model and write a report to out/demo
	$(BIN)/fxq demo --out $(OUT)

lint: $(STAMP) ## formatting, lint rules and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --num-workers $(WORKERS)

check: lint test-fast ## lint and the fast tests

$(RUNTIMES)/.installed: tests/export/runtimes.txt $(STAMP)
	@rm -rf $(RUNTIMES)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $(RUNTIMES) -r $<
	@touch $@

browser: $(STAMP) ## fetch a headless Chromium for tests of fxq play, where there is none; no failure where it cannot
	@$(BIN)/python tests/machine/browser.py

# Last comes the whole suite as the machine is, so that its counts close the run.
test: $(STAMP) ## lint, fast and slow tests, on a larger CPU those of its kernels as with AVX2 only too
	@$(MAKE) --no-print-directory -j 3 lint $(RUNTIMES)/.installed browser
	@if $(BIN)/python -c 'from fxq import cpu; raise SystemExit(not cpu.above_avx2())'; then $(MAKE) --no-print-directory test-avx2; fi
	$(PYTEST) -m "not gpu and not sweep"

test-all: lint $(RUNTIMES)/.installed browser ## every test that needs no GPU, whole families included: over half an hour
	$(PYTEST) -m "not gpu"

test-torch: ## the fast tests with TORCH, another version, in an environment of its own: make test-torch TORCH=2.11.0
	@test -n "$(TORCH)" || { echo "error: say which: make test-torch TORCH=2.11.0" >&2; exit 1; }
	@$(MAKE) --no-print-directory VENV=$(VENV)-torch-$(TORCH) test-fast

test-fast: $(STAMP)
	$(PYTEST)

test-avx2: $(STAMP) ## the fast tests whose result may depend on the CPU, as on one with AVX2 only
	tests/machine/as_avx2 $(PYTEST) $(DEPEND_ON_CPU)

test-avx2-all: $(STAMP) ## every test that needs no GPU, as on a CPU with AVX2 only
	tests/machine/as_avx2 $(PYTEST) -m "not gpu"

$(DOCS_STAMP): docs/requirements.txt $(STAMP)
	@echo "installing what the site needs into $(VENV)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.txt -r docs/requirements.txt
	@touch $@

# Not --quiet: warnings that are not shown are not counted by --strict either.
docs: $(DOCS_STAMP) ## build the pages and the reference as a site, strictly, into site/index.html
	env OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open site/index.html"

dist: $(STAMP) ## build wheel and source distribution into dist
	rm -rf dist
	$(BIN)/python -m build --no-isolation

release-check: $(STAMP) ## whether this commit can be released: version, changelog, pins, tests, dist, docs
	$(BIN)/python .ci/release_check.py
	$(MAKE) --no-print-directory test-avx2 test-all dist docs

format: $(STAMP) ## rewrite the sources in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove build products, keep .venv
	rm -rf build dist out site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
