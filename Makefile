# Everything runs in .venv, made on first use. Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
DOCS := $(VENV)/docs

# Two processes; the tests of a file stay in one, which shares what they train.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

# What runs under coverage, which makes it half as long again; test-rest runs the others.
COVERED := tests/model tests/storage tests/faults/test_two_processes.py

.PHONY: demo test test-all test-rest coverage lint format notebooks docs site-check clean

demo: $(READY)
	$(BIN)/pyro-scanvi demo

test: $(READY)
	$(TESTS) -m "not slow"

test-all: $(READY)
	$(TESTS)

test-rest: $(READY)
	$(TESTS) $(COVERED:%=--ignore=%)

coverage: $(READY)
	$(TESTS) --cov=pyro_scanvi --cov-branch --cov-report= $(COVERED)
	$(BIN)/coverage report --include='*/model/distributions.py' --fail-under=100
	$(BIN)/coverage report --include='*/model/scanvae.py' --fail-under=100
	$(BIN)/coverage report --include='*/model/objective.py' --fail-under=100
	$(BIN)/coverage report --include='*/storage/*' --fail-under=97

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(READY)
	$(BIN)/python notebooks/execute.py

docs: $(DOCS)
	$(BIN)/python docs/build.py

site-check: $(DOCS)
	$(BIN)/python docs/check_site.py

$(DOCS): $(READY)
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	touch $@

$(READY): setup.cfg constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, this is " + sys.version'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo_output build .coverage .mypy_cache *.egg-info
