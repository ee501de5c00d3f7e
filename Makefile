# One verb a wish; each makes what it needs. PYTHON picks the interpreter of the environment.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TOOLS  := build/tools
PIP    := -m pip install --quiet --disable-pip-version-check
# Tests on how many cores, a file at a time on each; a process takes about 1 GB.
SPREAD := --numprocesses=logical --maxprocesses=4 --dist=loadfile
# Which dependencies: pinned (requirements.txt), newest, or lowest (what pyproject.toml still allows).
DEPENDENCIES ?= pinned

.PHONY: audit axe bench check clean coverage demo dist docs faults fuzz imports lint lock notebook pages sbom setup test \
	test-all test-lowest types

demo: $(STAMP)            ## the main job on real input, ends with a table and a page
	$(BIN)/orthomerge demo --output runs/demo

test: $(STAMP)            ## the test suite, on each core
	$(BIN)/python -m pytest $(SPREAD)

test-all: $(STAMP)        ## the test suite with the slow tests
	$(BIN)/python -m pytest -m "slow or not slow" $(SPREAD)

notebook: $(STAMP)         ## the notebook under examples/, from the top
	$(BIN)/python -m pytest -m slow tests/docs/test_notebook.py

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
	$(BIN)/python -m benchmarks.readme
	$(BIN)/python -m benchmarks.table
	$(BIN)/python -m benchmarks.methods
	$(BIN)/python -m benchmarks.evidence
	$(BIN)/python -m benchmarks.convert
	$(BIN)/python -m benchmarks.paper
	$(BIN)/python -m benchmarks.privacy_page
	$(BIN)/python docs/figures/architecture.py
	$(BIN)/python -m docs.figures.theory
	$(BIN)/python -m docs.figures.offline8
	$(BIN)/python -m docs.figures.penalty

check: lint types imports docs test

bench: $(STAMP)           ## speed and memory, and the page that shows them
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python benchmarks/subspace.py
	$(BIN)/python benchmarks/statistics.py
	$(BIN)/python -m benchmarks.starts
	$(BIN)/python -m benchmarks.penalty
	$(BIN)/python -m benchmarks.merging
	$(BIN)/python -m benchmarks.merging --methods
	$(BIN)/python -m benchmarks.merging --whole
	$(BIN)/python -m benchmarks.full_model
	$(BIN)/python -m benchmarks.table
	$(BIN)/python -m benchmarks.methods

coverage: $(STAMP)        ## the test suite with the share of lines it runs, and the least it may be
	$(BIN)/python -m pytest $(SPREAD) --cov --cov-report=term:skip-covered --cov-report=xml:build/coverage.xml

test-lowest:              ## the test suite on the lowest versions that the ranges admit
	$(MAKE) test VENV=build/lowest DEPENDENCIES=lowest

lock: $(TOOLS)/.installed ## requirements.txt by hash, and the lowest versions, from pyproject.toml
	$(TOOLS)/bin/python tools/lock.py $(LOCK)

sbom: $(STAMP) $(TOOLS)/.installed  ## what is installed for the demo, as CycloneDX: build/sbom.json
	$(TOOLS)/bin/cyclonedx-py requirements requirements.txt --pyproject pyproject.toml \
	  --output-reproducible --of JSON -o build/sbom.json

audit: $(TOOLS)/.installed  ## known holes in the pinned packages; asks a public database
	$(TOOLS)/bin/pip-audit --strict --requirement requirements.txt --no-deps --disable-pip

dist: $(TOOLS)/.installed ## wheel and sdist in dist/, checked
	rm -rf dist
	$(TOOLS)/bin/python -m build --outdir dist
	$(TOOLS)/bin/twine check --strict dist/*
	$(TOOLS)/bin/check-wheel-contents dist/*.whl

faults: $(STAMP)          ## 200 faults in a whole run and in every verb, and the page that tells
	$(BIN)/python tests/faults/faults.py --faults 200

fuzz: $(STAMP)            ## broken files by the thousand, and the table that says what came out
	$(BIN)/python tests/faults/fuzzing.py

setup: $(STAMP)

# The demo's packages come by hash and without what they ask for: the list is whole. What it leaves
# out are the CUDA libraries, which the last line brings where pip chose the CUDA build of torch; a
# build without CUDA comes first where pip finds one, since among equal pins pip takes its index's.
# With the lowest versions come the newest test tools that do with them.
$(STAMP): pyproject.toml requirements.txt requirements-cpu.txt requirements-lowest.txt
	$(PYTHON) -m venv $(VENV)
ifeq ($(DEPENDENCIES),lowest)
	$(BIN)/python $(PIP) --no-deps -r requirements-lowest.txt
	$(BIN)/python $(PIP) --constraint requirements-lowest.txt -e . beartype hypothesis ipykernel \
	  nbclient optuna pytest pytest-cov pytest-xdist ray starlette tensorboard uvicorn
else
ifeq ($(DEPENDENCIES),pinned)
	@$(BIN)/python $(PIP) --require-hashes --no-deps -r requirements-cpu.txt 2>$(VENV)/cpu.log || \
	  echo "pip finds no build of the pinned torch without CUDA (+cpu): the index's own is taken"
	$(BIN)/python $(PIP) --require-hashes --no-deps -r requirements.txt
endif
	$(BIN)/python $(PIP) -e ".[dev,docs]"
endif
	touch $(STAMP)

$(TOOLS)/.installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python $(PIP) build check-wheel-contents cyclonedx-bom pip-audit twine uv
	touch $@

# Kept out of the repository; the test that reads it is skipped without it.
node_modules/axe-core/axe.min.js:
	npm install --silent --no-save --no-package-lock --prefix . axe-core@4.14.1

clean:
	rm -rf $(VENV) build dist runs node_modules
