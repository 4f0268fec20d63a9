# make test     everything that must hold, in an environment of its own (.venv)
# make test-browser   the inspection's page, in Chromium
# make clean    remove that environment

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt

BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: test test-browser lint install clean
.DEFAULT_GOAL := test

test: lint
	$(BIN)/python -m pytest

test-browser: install
	$(BIN)/python -m pytest -m browser

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

# torch first and alone: what pip then resolves finds it there, and fetches no other build of it.
$(VENV)/.installed: pyproject.toml mergekit_ace_autoload.pth $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV)

# --- demo ---
# make demo     merge four real adapters by ACE and by three other methods, and compare them

.PHONY: demo
demo: $(VENV)/.demo-installed
	$(BIN)/python -m demo

# The tests run the demo too.
test: $(VENV)/.demo-installed

$(VENV)/.demo-installed: $(VENV)/.installed demo/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -r demo/requirements.txt
	touch $@

# --- end of demo ---
