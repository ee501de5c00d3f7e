# One verb a wish; each makes what it needs. PYTHON picks the interpreter of the environment.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Which dependencies: pinned (requirements.txt), newest, or lowest (what pyproject.toml still allows).
DEPENDENCIES ?= pinned

.PHONY: axe bench demo docs pages test test-all lint types imports check setup clean

demo: $(STAMP)            ## the main job on real input, ends with a table and a page
	$(BIN)/orthomerge demo --output runs/demo

test: $(STAMP)            ## the test suite
	$(BIN)/python -m pytest

test-all: $(STAMP)        ## the test suite with the slow tests
	$(BIN)/python -m pytest -m "slow or not slow"

axe: node_modules/axe-core/axe.min.js  ## axe-core (MPL-2.0), for the test of the page's accessibility

lint: $(STAMP)            ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)           ## types
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: $(STAMP)         ## imports go one way
	$(BIN)/lint-imports

docs: $(STAMP)            ## the documentation site, in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

pages: $(STAMP)           ## what pages and pictures are made of files, made again
	$(BIN)/python -m benchmarks.table
	$(BIN)/python -m benchmarks.methods
	$(BIN)/python -m benchmarks.evidence
	$(BIN)/python -m benchmarks.convert
	$(BIN)/python docs/figures/architecture.py
	$(BIN)/python -m docs.figures.theory

check: lint types imports docs test

bench: $(STAMP)           ## speed and memory, and the page that shows them
	$(BIN)/python benchmarks/subspace.py
	$(BIN)/python benchmarks/statistics.py
	$(BIN)/python -m benchmarks.starts
	$(BIN)/python -m benchmarks.merging
	$(BIN)/python -m benchmarks.merging --methods
	$(BIN)/python -m benchmarks.merging --whole
	$(BIN)/python -m benchmarks.full_model
	$(BIN)/python -m benchmarks.table
	$(BIN)/python -m benchmarks.methods

setup: $(STAMP)

# torch comes first and pinned, so that nothing else chooses a build for it.
$(STAMP): pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
ifeq ($(DEPENDENCIES),lowest)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --resolution lowest-direct -e ".[dev,docs]"
else
ifeq ($(DEPENDENCIES),pinned)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
endif
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,docs]"
endif
	touch $(STAMP)

# Kept out of the repository; the test that reads it is skipped without it.
node_modules/axe-core/axe.min.js:
	npm install --silent --no-save --no-package-lock --prefix . axe-core@4.14.1

clean:
	rm -rf $(VENV) build dist runs node_modules
