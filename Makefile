PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= auto # processes that run tests: one a core, at most 8; 0 runs them in this process
ARGS ?= # further options for pytest

.PHONY: setup demo test lint

# creates .venv with the project, its server and page, the test dependencies and the lint tools
setup: .venv/.stamp

demo: setup
	$(BIN)/python examples/demo.py

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal $(ARGS)

lint: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -e '.[serve,ui,test,dev]' -c constraints.txt
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'setup: Python 3.10 or newer is needed, $(PYTHON) is not: try make setup PYTHON=python3.11' >&2; exit 1; }
	@$(PYTHON) -m venv .venv >/dev/null 2>&1 || { rm -rf .venv; \
	  echo 'setup: $(PYTHON) -m venv failed: install the venv module (Debian, Ubuntu: apt install python3-venv)' >&2; exit 1; }
