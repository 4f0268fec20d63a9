# make test     everything that must hold, in an environment of its own (.venv)
# make test-oldest    the tests, with the oldest versions of what we and mergekit build on (.venv-oldest)
# make test-mergekit  mergekit's own tests, with the plugin and without it (network: fetches their source)
# make test-browser   the inspection's page, in Chromium
# make test-mutations  which changes of a line of the maths no test notices (a sample; MUTANTS='--sample 400 --seed 5')
# make docs     the pages of docs/, as site/; a dead link ends it
# make clean    remove the environments

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt

BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: test test-oldest test-mergekit test-browser test-mutations lint docs install clean
.DEFAULT_GOAL := test

test: lint
	$(BIN)/python -m pytest

test-browser: install
	$(BIN)/python -m pytest -m browser

# Or names of mutants and patterns of them: make test-mutations MUTANTS='mergekit_ace.linalg.cholesky*'
MUTANTS ?= --sample 100

test-mutations: install
	$(BIN)/python -m pip install --quiet 'mutmut>=3.8,<4'
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutations.py $(MUTANTS)

test-oldest:
	$(MAKE) VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt .venv-oldest/.demo-installed
	.venv-oldest/bin/python -m pytest

# Or a checkout of the version that is installed: what mergekit 0.1.5 distributes lacks tests/common.py, without which
# six of the seventeen files cannot be imported.
MERGEKIT_SOURCE ?= $(VENV)/mergekit-source

test-mergekit: install $(MERGEKIT_SOURCE)/pyproject.toml
	$(BIN)/python -m tests.upstream $(MERGEKIT_SOURCE)

$(VENV)/mergekit-source/pyproject.toml: | install
	mkdir -p $(@D)
	version=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("mergekit"))') && \
	$(BIN)/python -m pip download --quiet --no-deps --no-binary mergekit --dest $(@D) "mergekit==$$version" && \
	tar -xzf $(@D)/mergekit-"$$version".tar.gz -C $(@D) --strip-components=1

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs-installed
	$(BIN)/mkdocs build --strict --quiet

$(VENV)/.docs-installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[docs]'
	touch $@

install: $(VENV)/.installed

# torch first and alone: what pip then resolves finds it there, and fetches no other build of it.
$(VENV)/.installed: pyproject.toml mergekit_ace_autoload.pth $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest site

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
