PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-slow lint clean

quickstart: $(VENV)/.installed  ## train a small model on the standard library and let it write
	$(BIN)/moebius train configs/quickstart.yaml
	$(BIN)/moebius generate runs/quickstart --prompt "def "

test: $(VENV)/.installed-dev  ## all tests but the slow ones
	$(BIN)/pytest

test-slow: $(VENV)/.installed-dev  ## the quickstart in a fresh clone, and every preset of both routings
	$(BIN)/pytest -m slow -s

lint: $(VENV)/.installed-dev  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:  ## remove the environment; prepared data and runs stay
	rm -rf $(VENV)

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed
